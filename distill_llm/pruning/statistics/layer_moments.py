"""Second moments of a few layers at a time, for models of which those of all do not fit."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, overload

import torch
from torch import nn

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.pruning.statistics.calibration_pass import Batches, CalibrationPass
from distill_llm.pruning.statistics.hooks import CalibrationBatch, begins_here, moments_hook
from distill_llm.pruning.statistics.moments import Moments, MomentsSum, finished
from distill_llm.pruning.statistics.processes import sum_over_processes
from distill_llm.pruning.units.sizes import linear, weight_of


class LayerMoments(Sequence[tuple[Moments, ...]]):
    """What `Statistics.moments` holds, collected when it is asked for: `at_once` layers in a pass over the data.

    The moments of the pass before are freed first, so ask in the order of the layers. With
    `dataclasses.replace(statistics, moments=LayerMoments(...))` compensation needs the memory of a few layers (about 0.9 GB
    a layer of an 8B model) and one more pass for each `at_once` layers.

    Args:
        calibration: the model, and how the pass ran that the statistics were collected in.
        batches: opens the data of that pass anew.
        at_once: how many layers.
    """

    def __init__(self, calibration: CalibrationPass, batches: Callable[[], Batches], at_once: int):
        self.calibration, self.batches, self.at_once = calibration, batches, at_once
        self._held: dict[int, tuple[Moments, ...]] = {}

    def __len__(self) -> int:
        return len(layers_of(self.calibration.model))

    @overload
    def __getitem__(self, index: int) -> tuple[Moments, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[tuple[Moments, ...]]: ...
    def __getitem__(self, index: Any) -> Any:
        layers = range(len(self))[index]
        if isinstance(layers, range):
            return [self[layer] for layer in layers]
        if layers not in self._held:
            self._held.clear()
            self._held = self._collect(range(layers, min(layers + self.at_once, len(self))))
        return self._held[layers]

    def _collect(self, layers: range) -> dict[int, tuple[Moments, ...]]:
        calibration, family = self.calibration, family_of(self.calibration.model)
        settings = calibration.settings
        every = list(layers_of(calibration.model))
        taps = [linear(every[i], path) for i in layers for path, _ in family.readers]
        sums = [MomentsSum(weight_of(tap).shape[1], calibration.device, settings.moment_share) for tap in taps]
        batch = calibration.batch()
        with ExitStack() as stack:
            stack.enter_context(calibration.prepared(from_embeddings=settings.checkpointing))
            for tap, its in zip(taps, sums, strict=True):
                hook = _input_hook(batch, moments_hook(batch, its))
                stack.enter_context(tap.register_forward_pre_hook(hook))
            calibration.over(self.batches(), batch)
        if settings.sharded:
            sum_over_processes([tensor for its in sums for tensor in its.tensors()])
        return dict(zip(layers, finished(sums, len(family.readers)), strict=True))


def _input_hook(
    batch: CalibrationBatch, see: Callable[[torch.Tensor], None]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A hook before a linear that shows its input to `see`."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        entering = begins_here(args[0]) if batch.with_loss and not batch.skipped else args[0]
        see(entering)
        return (entering, *args[1:])

    return hook
