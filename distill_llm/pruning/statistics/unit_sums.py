"""Running sums of a calibration pass, and the statistics of units that they become."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill_llm.pruning.statistics.record import UnitStatistics
from distill_llm.pruning.units.sizes import weight_of


class UnitSums:
    """Running sums of one tensor: the input of a linear (C channels), the residual stream (C channels), or what a layer adds
    to its input (one value).

    Args:
        readers: the linears that read the tensor, if any.
        sizes: by kind of unit in the tensor, how many channels a unit has; units lie side by side.
        channels: C, where there are no readers.
    """

    def __init__(
        self,
        readers: Sequence[nn.Linear | Conv1D],
        sizes: Mapping[str, int],
        device: torch.device,
        channels: int = 1,
    ):
        norms = [weight_of(reader).detach().float().abs().sum(0) for reader in readers]
        self.read = (sum(norms[1:], norms[0]) if norms else torch.ones(channels)).to(device)
        self.sizes = sizes
        self.activation = torch.zeros_like(self.read)
        self.sums = {
            kind: torch.zeros(2, len(self.read) // size, device=self.read.device) for kind, size in sizes.items()
        }
        self.whole = torch.zeros(2, device=self.read.device)

    def add_gradients(self, per_example: torch.Tensor) -> None:
        """(B, C): sums over valid tokens of a g."""
        for kind, size in self.sizes.items():
            effect = _by_unit(per_example, size)
            self.sums[kind] += torch.stack([effect.abs().sum(0), effect.square().sum(0)])
        block = per_example.sum(-1)
        self.whole += torch.stack([block.abs().sum(), block.square().sum()])

    def tensors(self) -> list[torch.Tensor]:
        """All sums."""
        return [self.activation, *self.sums.values(), self.whole]

    def finish(self, kind: str, squares: torch.Tensor, absolute: torch.Tensor) -> UnitStatistics:
        """The statistics of a kind of unit, given sums of squares and of absolute values of their weights."""
        wanda = _by_unit(self.activation.sqrt() * self.read, self.sizes[kind])
        found = (*self.sums[kind], _by_unit(self.activation, self.sizes[kind]), wanda, squares, absolute)
        return UnitStatistics(*(each.float().cpu() for each in found))

    def block(self, squares: torch.Tensor, absolute: torch.Tensor) -> UnitStatistics:
        """The statistics of all units together, as of one."""
        wanda = (self.activation.sqrt() * self.read).sum()
        found = (*self.whole, self.activation.sum(), wanda, squares.sum(), absolute.sum())
        return UnitStatistics(*(each.float().cpu()[None] for each in found))


def _by_unit(per_channel: torch.Tensor, size: int) -> torch.Tensor:
    return per_channel if size == 1 else per_channel.unflatten(-1, (-1 if per_channel.numel() else 0, size)).sum(-1)


def stacked(rows: list[UnitStatistics]) -> UnitStatistics:
    """Statistics of one unit each, joined."""
    return UnitStatistics(*(torch.cat(values) for values in zip(*(vars(row).values() for row in rows), strict=True)))
