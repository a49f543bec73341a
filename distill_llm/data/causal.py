"""Rows and batches of causal language modelling: documents cut into rows, short sequences packed, padding."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_llm.data.answers import answer_text
from distill_llm.data.padding import LENGTH, Features, PaddingCollator, Rows
from distill_llm.data.sources import split_documents
from distill_llm.data.special_tokens import document_end, special_ends, token_count
from distill_llm.losses.labels import IGNORED


def document_packer(column: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
    """A function from documents to rows of `max_length` tokens, each with its tokens as labels.

    Each document ends with the token of `document_end`. The tokens of all documents are put in one line, which is cut
    wherever a row is full. Where the tokenizer puts special tokens before a text, every document and every row begin with
    them. A last row of one token predicts nothing and is left out.

    Args:
        column: the column with the documents; `<|endoftext|>` in a text separates two documents.
        tokenizer: with an EOS or BOS token.
        max_length: tokens in a row.
    """
    (begin, _), end = special_ends(tokenizer), document_end(tokenizer)
    assert end is not None, "checked by check_tokenizer"
    room = max_length - len(begin)

    def work(rows: Rows) -> Rows:
        documents = split_documents(rows[column])
        tokens: list[int] = []
        for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"] if documents else ():
            tokens += [*(begin if tokens else ()), *ids, end]
        pieces = [[*begin, *tokens[start : start + room]] for start in range(0, len(tokens), room)]
        pieces = [piece for piece in pieces if len(piece) > 1]
        return as_rows(pieces, pieces)

    return work


def as_rows(input_ids: list[list[int]], labels: list[list[int]]) -> Rows:
    """Columns of rows without padding."""
    lengths = [len(ids) for ids in input_ids]
    masks = [[1] * length for length in lengths]
    return {"input_ids": input_ids, "attention_mask": masks, "labels": labels, LENGTH: lengths}


def sequence_packer(max_length: int) -> Callable[[Rows], Rows]:
    """A function that packs whole sequences into rows of at most `max_length` tokens.

    The longest sequences go first, each into the first row with room. `position_ids` start at 0 in every sequence, which
    keeps the sequences apart (see `distill_llm.models.inputs.packed_sequences`).
    """

    def work(rows: Rows) -> Rows:
        lengths = rows[LENGTH]
        bins: list[list[int]] = []
        free: list[int] = []
        for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            place = next((place for place, left in enumerate(free) if left >= lengths[index]), len(bins))
            if place == len(bins):
                bins.append([])
                free.append(max_length)
            bins[place].append(index)
            free[place] -= lengths[index]

        def joined(columns: list[list[int]]) -> list[list[int]]:
            return [[value for index in members for value in columns[index]] for members in bins]

        positions = [list(range(length)) for length in lengths]
        return as_rows(joined(rows["input_ids"]), joined(rows["labels"])) | {"position_ids": joined(positions)}

    return work


class CausalCollator(PaddingCollator):
    """Pads rows on the right: ids with the padding token (EOS where there is none), labels with -100.

    Masks come from the lengths of the rows, so the padding token may also be a real one (often EOS). In packed rows,
    padding has position 0: each padding token is a sequence of its own.

    Args:
        tokenizer: with a padding, EOS or BOS token; it stays unchanged.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else document_end(tokenizer)
        assert pad is not None, "checked by check_tokenizer"
        self.pad = int(pad)
        self.left, self.values = False, {"input_ids": self.pad, "labels": IGNORED}

    @cached_property
    def tokens(self) -> int:
        """See `token_count`."""
        return token_count(self.tokenizer)

    def prompts(self, features: Features) -> dict[str, Tensor]:
        """The prompts of rows of the task `prompts`, padded on the left, for generation.

        Returns:
            `input_ids` and `attention_mask`, both (B, T) int64.
        """
        ids = [torch.as_tensor(row["input_ids"][: prompt_length(row["labels"])]) for row in features]
        masks = [torch.ones_like(each) for each in ids]
        sides: Any = {"batch_first": True, "padding_side": "left"}
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, padding_value=self.pad, **sides),
            "attention_mask": pad(masks, padding_value=0, **sides),
        }

    def text(self, ids: list[int]) -> str:
        """Token ids as text without special tokens."""
        return answer_text(self.tokenizer, ids)


def prompt_length(labels: list[int]) -> int:
    """Tokens before the first one with a label."""
    return next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
