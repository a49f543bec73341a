"""The loss of an evaluation: a mean over all labels, however batches and processes divide them."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator

from distill_llm.losses.items import count_items, first_rows, row_count
from distill_llm.losses.units import UNITS, Kind


class EvaluationLoss:
    """Adds up the loss against the labels over the batches of one evaluation.

    Args:
        accelerator: of the trainer; its data loader makes the batches.
        kind: of the student (see `kind_of`).
    """

    def __init__(self, accelerator: Accelerator, kind: Kind):
        self.accelerator, self.kind = accelerator, kind
        self.sums = torch.zeros(2, device=accelerator.device)  # of the loss, and of labels

    def rows(self, inputs: Mapping[str, Any]) -> int:
        """How many of a batch's first rows count: the rows after them are repeats that give every process as many."""
        rows, loader = row_count(inputs), self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not loader.end_of_dataloader or loader.remainder <= 0:
            return rows
        return min(max(loader.remainder - self.accelerator.process_index * rows, 0), rows)

    def add(self, total: torch.Tensor, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Add a batch's sum, 0-dim, over the rows that count; returns the number of their labels, 0-dim."""
        labels = count_items(first_rows(inputs, self.rows(inputs)), self.kind)[UNITS.index("labels")]
        self.sums += torch.stack([total.detach().float(), labels.float()])
        return labels

    def mean(self) -> float:
        """Over all labels of all processes; 0 where there are none."""
        total, labels = self.accelerator.reduce(self.sums, reduction="sum").tolist()
        return total / max(labels, 1.0)
