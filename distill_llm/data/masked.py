"""Rows and batches of masked language modelling: documents packed into rows, tokens hidden."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_llm.data.draws import row_generator
from distill_llm.data.epochs import Epoch
from distill_llm.data.padding import LENGTH, Features, PaddingCollator, Rows
from distill_llm.data.sources import split_documents
from distill_llm.data.special_tokens import special_ends
from distill_llm.losses.labels import IGNORED

MASKED_SHARE = 0.15


class MaskingCollator(PaddingCollator):
    """Pads, and hides 15% of the tokens: 80% become the mask token, 10% a random one, 10% stay (BERT, Devlin et al.
    2018, 3.1).

    Which tokens are hidden depends only on the row's tokens, the seed and the epoch. So batches may be divided over
    accumulation steps and processes in any way, nothing has to be saved to resume, and two models see the same masks. At
    least one token of every row is predicted, unless all of them are special.

    Args:
        tokenizer: gives the special tokens, which are never hidden.
        seed: another seed gives other masks.

    Attributes:
        epoch: which masks are made; it stays 0 where nothing counts epochs.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        super().__init__(tokenizer)
        self.seed, self.epoch = seed, Epoch()
        self.mask, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self.special = np.array(sorted(tokenizer.all_special_ids))

    def at(self, epoch: Epoch) -> "MaskingCollator":
        """A copy that follows the epochs of a training; the masks of evaluation stay as they are."""
        other = copy.copy(self)
        other.epoch = epoch
        return other

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """One batch of `features` with masked `input_ids` and `labels`."""
        return super().__call__([{**row, **self._masked(np.asarray(row["input_ids"]))} for row in features])

    def _masked(self, ids: np.ndarray) -> dict[str, Any]:
        """Masked ids and labels of a row of ids (T,)."""
        generator = row_generator(ids, self.seed, self.epoch.number)
        draw, fate = generator.random((2, len(ids)))
        random = generator.integers(self.vocabulary, size=len(ids))
        draw[np.isin(ids, self.special)] = 2
        chosen = (draw <= max(MASKED_SHARE, draw.min(initial=2))) & (draw < 2)
        hidden = np.where(chosen & (fate < 0.8), self.mask, ids)
        return {"input_ids": np.where(chosen & (fate >= 0.9), random, hidden), "labels": np.where(chosen, ids, IGNORED)}


def masked_packer(column: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
    """A function from documents to rows of `max_length` tokens, between the tokenizer's special tokens.

    The tokens of all documents are put in one line, with the separator token (if there is one) between documents, and the
    line is cut wherever a row is full.

    Args:
        column: the column with the documents; `<|endoftext|>` in a text separates two documents.
        tokenizer: gives the tokens.
        max_length: tokens in a row.
    """
    begin_ids, end_ids = special_ends(tokenizer)
    room = max_length - len(begin_ids) - len(end_ids)
    separator = [tokenizer.sep_token_id] if tokenizer.sep_token_id is not None else []

    def work(rows: Rows) -> Rows:
        documents = split_documents(rows[column])
        if not documents:
            return {"input_ids": [], "attention_mask": [], LENGTH: []}
        tokens: list[int] = []
        for ids in tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += [*separator, *ids] if tokens else ids
        pieces = [tokens[begin : begin + room] for begin in range(0, len(tokens), room)]
        result = [[*begin_ids, *piece, *end_ids] for piece in pieces]
        return {
            "input_ids": result,
            "attention_mask": [[1] * len(ids) for ids in result],
            LENGTH: [len(ids) for ids in result],
        }

    return work
