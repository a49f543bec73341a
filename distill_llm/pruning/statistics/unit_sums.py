"""Running sums of a calibration pass, and the statistics of units that they become."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from distill_llm.pruning.statistics.magnitudes import WeightSums
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
        weights = [weight_of(reader).detach().float() for reader in readers] or [torch.ones(1, channels)]
        self.read = sum(weight.abs().sum(0) for weight in weights).to(device)  # type: ignore[union-attr]
        self.squares = sum(weight.square().sum(0) for weight in weights).to(device)  # type: ignore[union-attr]
        self.sizes = sizes
        self.activation, self.total = torch.zeros_like(self.read), torch.zeros_like(self.read)
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
        return [self.activation, self.total, *self.sums.values(), self.whole]

    def finish(self, kind: str, weights: WeightSums, tokens: int) -> UnitStatistics:
        """The statistics of a kind of unit, given sums over their weights."""
        size = self.sizes[kind]
        wanda = _by_unit(self.activation.sqrt() * self.read, size)
        fluctuation = _by_unit(self._standardised(tokens), size) / size
        sums = (*self.sums[kind], _by_unit(self.activation, size), wanda)
        taylor, fisher, activation, wanda = (each.float().cpu() for each in sums)
        squares, absolute, weight_taylor = weights
        none = torch.zeros(len(wanda))
        return UnitStatistics(
            taylor, fisher, activation, wanda, squares, absolute, fluctuation.cpu(), weight_taylor, none, none.clone()
        )

    def block(self, weights: WeightSums) -> UnitStatistics:
        """The statistics of all units together, as of one."""
        squares, absolute, taylor = weights.sum(1)
        wanda = (self.activation.sqrt() * self.read).sum()
        none = torch.zeros(())
        found = (*self.whole, self.activation.sum(), wanda, squares, absolute, none, taylor, none, none)
        return UnitStatistics(*(each.float().cpu()[None] for each in found))

    def _standardised(self, tokens: int) -> torch.Tensor:
        """(C,): sample variances over tokens times squared norms of weights, less their mean, over their standard deviation."""
        if not tokens:
            return torch.zeros_like(self.total)
        count = max(tokens, 2)
        variance = (self.activation - self.total.square() / count).clamp(min=0) / (count - 1)
        fluctuation = (variance * self.squares).double()
        spread = fluctuation.std() if len(fluctuation) > 1 else fluctuation.sum() * 0
        return ((fluctuation - fluctuation.mean()) / torch.where(spread > 0, spread, 1.0)).float()


def _by_unit(per_channel: torch.Tensor, size: int) -> torch.Tensor:
    return per_channel if size == 1 else per_channel.unflatten(-1, (-1 if per_channel.numel() else 0, size)).sum(-1)


def stacked(rows: list[UnitStatistics]) -> UnitStatistics:
    """Statistics of one unit each, joined."""
    return UnitStatistics(*(torch.cat(values) for values in zip(*(vars(row).values() for row in rows), strict=True)))
