"""Rows of token ids to one padded batch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_llm.losses.labels import IGNORED

Features = Sequence[Mapping[str, Any]]
Collator = Callable[[Features], dict[str, Tensor]]

Rows = dict[str, list[Any]]

LENGTH = "length"


class PaddingCollator:
    """Pads rows to the longest of the batch, on the tokenizer's side.

    Args:
        tokenizer: gives the padding values and the side.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.left = tokenizer.padding_side == "left"
        self.values = {"input_ids": tokenizer.pad_token_id, "token_type_ids": tokenizer.pad_token_type_id}
        self.values["labels"] = IGNORED  # of kinds with a label per token

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """One batch of `features`, without their `length`."""
        batch = {}
        for name in features[0]:
            if name == LENGTH:
                continue
            rows = [torch.as_tensor(row[name]) for row in features]
            batch[name] = torch.stack(rows) if rows[0].dim() == 0 else self._pad(rows, self.values.get(name, 0))
        return batch

    def _pad(self, rows: list[Tensor], value: int) -> Tensor:
        side = "left" if self.left else "right"
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
