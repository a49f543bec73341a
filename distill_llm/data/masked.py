"""Rows and batches of masked language modelling: documents packed into rows, tokens hidden."""

import zlib
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_llm.data.padding import LENGTH, Features, PaddingCollator, Rows
from distill_llm.data.sources import split_documents
from distill_llm.data.special_tokens import special_ends

MASKED_SHARE = 0.15


class MaskingCollator(PaddingCollator):
    """Pads, then hides 15% of the tokens: 80% become the mask token, 10% a random one, 10% stay (BERT, Devlin et al.
    2018, 3.1).

    Which tokens is a function of the seed and the batch's tokens alone: no generator has to be saved to resume, two
    models see the same masks, and an epoch in another order has other masks. At least one token of every batch is
    predicted.

    Args:
        tokenizer: gives the special tokens, which are never hidden.
        seed: other seeds, other masks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        super().__init__(tokenizer)
        self.seed = seed
        self.mask, self.vocabulary = tokenizer.mask_token_id, len(tokenizer)
        self.special = torch.tensor(sorted(tokenizer.all_special_ids))

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """One batch of `features` with masked `input_ids` and `labels`."""
        batch = super().__call__(features)
        ids = batch["input_ids"]
        generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), self.seed & 0xFFFFFFFF))
        usable = ~torch.isin(ids, self.special)
        draw = torch.rand(ids.shape, generator=generator).masked_fill(~usable, 2.0)
        chosen = usable & (draw <= max(MASKED_SHARE, draw.min().item()))
        fate = torch.rand(ids.shape, generator=generator)
        random = torch.randint(self.vocabulary, ids.shape, generator=generator)
        batch["labels"] = ids.masked_fill(~chosen, -100)
        hidden = ids.masked_fill(chosen & (fate < 0.8), self.mask)
        batch["input_ids"] = torch.where(chosen & (fate >= 0.9), random, hidden)
        return batch


def masked_packer(column: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
    """A function from documents to rows of `max_length` tokens, between the tokenizer's special tokens.

    The documents' tokens are joined with the separator token, where there is one, and cut wherever a row is full.

    Args:
        column: the column with the documents; `<|endoftext|>` in a text parts two documents.
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
