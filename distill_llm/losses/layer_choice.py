"""Layers that are matched by how near their states are: one partner each, or a mixture of all."""

from math import ceil

import torch

from distill_llm.losses.memory import Memory


def nearest(costs: torch.Tensor, ordered: bool) -> torch.Tensor:
    """(R,) the column of least cost for each row; found without waiting for the device.

    Args:
        costs: (R, C).
        ordered: no row may get a column before that of an earlier row; then the sum of all costs is the least.
    """
    if not ordered:
        return costs.argmin(1)
    best, before = costs[0], []
    for row in costs[1:]:
        least, places = best.cummin(0)  # of the columns up to each
        best = row + least
        before.append(places)
    column = best.argmin()
    found = [column]
    for places in reversed(before):
        column = places[column]
        found.append(column)
    return torch.stack(found[::-1])


def spread(rows: int, columns: int) -> list[int]:
    """The columns that rows are matched with where no costs are known: evenly, the last with the last."""
    return [ceil((row + 1) * columns / rows) - 1 for row in range(rows)]


class Matched(Memory):
    """Which column each row is matched with: in a step, that of the least costs of the step before.

    Args:
        rows, columns: how many layers of the one model are matched with how many of the other.
        ordered: see `nearest`.

    Attributes:
        choice: (rows,) of the columns; spread evenly before the first step.
        costs: (rows, columns) of the last step, a mean over valid tokens.
    """

    choice: torch.Tensor
    costs: torch.Tensor

    def __init__(self, rows: int, columns: int, ordered: bool):
        super().__init__()
        self.ordered = ordered
        self.register_buffer("choice", torch.tensor(spread(rows, columns)))
        self.register_buffer("costs", torch.zeros(rows, columns))
        self._read: list[int] | None = None

    def chosen(self) -> list[int]:
        """`choice`, for which the device is waited for once a step."""
        if self._read is None:
            self._read = self.choice.tolist()
        return self._read

    def advance(self, *columns: torch.Tensor) -> None:
        """Choose anew by the costs of all rows of a step.

        Args:
            columns: (E, rows, columns) sums over the valid tokens of each example, and how many these are, (E,).
        """
        costs, tokens = columns
        self.costs.copy_(costs.sum(0) / tokens.sum().clamp(min=1))
        self.choice.copy_(nearest(self.costs, self.ordered))
        self._read = None

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[arg-type]
        self._read = None


def attended(own: torch.Tensor, source: torch.Tensor, temperature: float) -> torch.Tensor:
    """(B, S, C) how much each student layer attends to each teacher layer: a softmax over cosines.

    Args:
        own, source: (B, S, H) and (B, C, H) pooled states.
        temperature: divides the cosines.
    """
    unit, other = (torch.nn.functional.normalize(each, dim=-1) for each in (own, source))
    return (unit @ other.transpose(1, 2) / temperature).softmax(-1)
