"""What a model's norms tell of the data that it was trained on, and how far a batch is from that."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass(frozen=True)
class Expected:
    """What one norm expects of each channel.

    Attributes:
        mean: (C,); None: nothing (an RMS norm).
        std: (C,), the standard deviation; without a mean the root of the second moment about 0.
        before: whether of its input (a batch norm), rather than of its output.
    """

    mean: Tensor | None
    std: Tensor
    before: bool


class NormStatistics:
    """The distance of a batch's channel statistics from what the norms of a model expect (DeepInversion, Yin et al., 2020).

    A batch norm keeps the mean and the variance of each channel of its input in the checkpoint. A layer norm keeps none, but
    its weight g and bias b imply them: it makes the channels of every token have mean 0 and variance 1, so if that holds for a
    channel over tokens too, its output has mean b and standard deviation |g|. An RMS norm implies the second moment g squared
    about 0, and no mean. Norms without a weight imply nothing and are left out.

    Args:
        model: whose norms; it is only read.
    """

    def __init__(self, model: nn.Module):
        self.expected: dict[nn.Module, Expected] = {}
        for module in model.modules():
            if (found := _expected(module)) is not None:
                self.expected[module] = found

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Of the forward in the context, the distance of each norm in turn (0-dim, differentiable).

        A distance is the mean over channels of the squared differences of means and of standard deviations, divided by the
        mean square of the expected standard deviations. Tokens are not told from padding: give rows without any.
        """
        distances: list[Tensor] = []

        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            expected = self.expected[module]
            seen = args[0] if expected.before else output
            channel = 1 if expected.before else -1
            distances.append(_distance(seen.float().movedim(channel, -1).flatten(0, -2), expected))

        handles = [module.register_forward_hook(watch) for module in self.expected]
        try:
            yield distances
        finally:
            for handle in handles:
                handle.remove()


def _expected(module: nn.Module) -> Expected | None:
    if isinstance(module, BATCH_NORMS):
        if module.running_mean is None or module.running_var is None:
            return None
        return Expected(module.running_mean.float(), module.running_var.float().sqrt(), before=True)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    if isinstance(module, nn.LayerNorm):
        bias = torch.zeros_like(weight) if module.bias is None else module.bias
        return Expected(bias.detach().float(), weight.detach().float().abs(), before=False)
    if "RMSNorm" in type(module).__name__:
        with torch.no_grad():  # of ones it gives its factors, which some families hold less 1
            factors = module(torch.ones_like(weight)[None, None]).flatten().float()
        return Expected(None, factors.abs(), before=False)
    return None


def _distance(seen: Tensor, expected: Expected) -> Tensor:
    """Of tokens (n, C)."""
    scale = expected.std.square().mean().clamp(min=1e-12)
    if expected.mean is None:
        std, apart = (seen.square().mean(0) + 1e-12).sqrt(), torch.zeros_like(expected.std)
    else:
        std, apart = (seen.var(0, unbiased=False) + 1e-12).sqrt(), (seen.mean(0) - expected.mean).square()
    return (apart + (std - expected.std).square()).mean() / scale
