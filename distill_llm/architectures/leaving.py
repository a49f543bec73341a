"""Rows that leave a forward before its last layer. Checkpoints of models with exits hold a copy of this file.

Needs only torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class AllHaveLeft(Exception):
    """Ends a forward that no row goes on with."""


class Leaving:
    """The rows of a batch in a forward in which they leave.

    Args:
        threshold: a row leaves where its largest probability is above this.
    """

    def __init__(self, threshold: float):
        self.threshold = threshold
        self.all = 0
        self.rows = torch.empty(0, dtype=torch.long)  # that go on, by their place in the batch
        self.left: list[tuple[torch.Tensor, torch.Tensor, int]] = []  # rows, logits, layers run
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the first layer: all rows are there."""
        states = args[0] if args else kwargs["hidden_states"]
        self.all, self.rows = len(states), torch.arange(len(states), device=states.device)

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Before a layer: what was made for all rows (masks) is handed on for those that are left."""
        if len(self.rows) == self.all:
            return None
        return tuple(map(self._of_rows, args)), {name: self._of_rows(value) for name, value in kwargs.items()}

    def _of_rows(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dim() < 2 or len(value) != self.all:
            return value
        if id(value) not in self._kept:
            self._kept[id(value)] = value, value.index_select(0, self.rows)
        return self._kept[id(value)][1]

    def at(self, head: nn.Module, layers: int) -> Callable[..., Any]:
        """A hook after a layer with an exit: rows that are sure leave."""

        def hook(module: nn.Module, args: tuple, output: Any) -> Any:
            states = output[0] if isinstance(output, tuple) else output
            logits = head(states[:, 0])[1]
            sure = logits.float().softmax(-1).amax(-1) > self.threshold
            stay = (~sure).nonzero().squeeze(-1)  # waits for the device
            if len(stay) == len(sure):
                return None
            self.left.append((self.rows[sure], logits[sure], layers))
            self.rows, self._kept = self.rows[stay], {}
            if not len(stay):
                raise AllHaveLeft
            states = states[stay]
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, C) logits and (B,) layers run, in the order of the batch."""
        order = torch.cat([rows for rows, _, _ in self.left]).argsort()
        counts = torch.cat([torch.full_like(rows, layers) for rows, _, layers in self.left])
        return torch.cat([logits for _, logits, _ in self.left])[order], counts[order]
