"""One pass over calibration data that collects every statistic of every unit.

Weights are frozen. Hooks on the linears that read a layer's units (attention-output, FFN-down) see their inputs a and,
through the backward pass, the gradients g of the loss there. Hooks on the linears that read the residual stream, and on its
last norm, do the same for its channels. Padding does not count (`attention_mask`).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of, layers_of, width_of
from distill_llm.architectures.lineage import LAYER_UNITS, kinds_of
from distill_llm.common.finite import check_weights
from distill_llm.pruning.statistics.calibration_loss import Loss
from distill_llm.pruning.statistics.calibration_pass import CalibrationPass, first_of
from distill_llm.pruning.statistics.hooks import (
    CalibrationBatch,
    layer_hook,
    moments_hook,
    reader_hook,
    see_channels,
    tap_hook,
)
from distill_llm.pruning.statistics.magnitudes import UnitWeights, unit_weights
from distill_llm.pruning.statistics.moments import MomentsSum, finished
from distill_llm.pruning.statistics.processes import sum_over_processes
from distill_llm.pruning.statistics.record import Statistics, UnitStatistics
from distill_llm.pruning.statistics.residual_stream import channel_readers, seen, stream_readers, stream_tensors
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.statistics.unit_sums import UnitSums, stacked
from distill_llm.pruning.statistics.weight_gradients import WeightGradients
from distill_llm.pruning.units.kind import UnitKind
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.pruning.units.sizes import counts_of, linear, weight_of


def collect_statistics(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    loss: Loss | None = "labels",
    teacher: PreTrainedModel | None = None,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> Statistics:
    """One pass over the data; the model is unchanged, its mode and flags are restored.

    Args:
        model: a model of a family with a row.
        dataloader: batches with `input_ids` and `attention_mask` of shape (B, T), of multiple choice (B, choices, T); for loss
            "labels" with `labels`, for question answering `start_positions` and `end_positions` (B,).
        loss: what gradients are taken of. "labels": the task's loss. "kl": the divergence from `teacher`; without a teacher,
            from the model itself: its gradient there is zero, and its curvature is the Fisher information with labels drawn
            from the model's own predictions, which is what is used (no labels needed). A callable: (outputs, batch) -> the
            sum over examples of their losses. None: no backward pass, for criteria without gradients.
        teacher: for loss "kl" alone.
        settings: what else is collected, and how the pass runs.

    Raises:
        InputError: another `loss`, a model that is offloaded or spread over devices, or batches without labels where they
            are needed.
        NotFinite: a weight, a batch's loss or a statistic is nan or infinite.
    """
    calibration = CalibrationPass(model, loss, teacher, settings)
    check_weights(model, "prune a model with finite weights: rows of unused tokens may be set to 0")
    shown, batches = first_of(dataloader)  # on every process, whoever collects of it
    sums = _PassSums(calibration, shown)
    batch = calibration.batch()
    with ExitStack() as stack:
        # Gradients of all channels, of all weights, or of what every layer reads, go all the way back to the embeddings.
        from_embeddings = settings.hidden or settings.hidden_moments or settings.checkpointing
        from_embeddings |= sums.gradients is not None
        stack.enter_context(calibration.prepared(from_embeddings))
        sums.watch(batch, stack)
        examples, tokens = calibration.over(batches, batch, partial(sums.add_channels, batch))
    if settings.sharded:
        sum_over_processes(sums.tensors())
    return sums.finish(examples, tokens).check()


class _PassSums:
    """The running sums of a pass over a model, and the hooks that fill them.

    Args:
        shown: a batch of the data, to find what reads and writes the residual stream; None where there is none.
    """

    def __init__(self, calibration: CalibrationPass, shown: Mapping[str, torch.Tensor] | None):
        model, settings, device = calibration.model, calibration.settings, calibration.device
        self.calibration, self.layers, family = calibration, layers_of(model), family_of(model)
        share = settings.moment_share
        self.taps: list[nn.Linear | Conv1D] = []  # what reads units of the first layer, then of the next
        self.units: list[UnitSums] = []
        for layer, counts in zip(self.layers, counts_of(model), strict=True):
            for path, letter in family.readers:
                tap = linear(layer, path)
                channels = weight_of(tap).shape[1]
                sizes = {kind: channels // counts[kind] if counts[kind] else 1 for kind in kinds_of(letter)}
                self.taps.append(tap)
                self.units.append(UnitSums([tap], sizes, device))
        moments = self.taps if settings.moments else []
        self.moments = [MomentsSum(weight_of(module).shape[1], device, share) for module in moments]
        with_weights = settings.weight_gradients and calibration.loss is not None
        self.gradients = WeightGradients(model, device) if with_weights else None
        self.changes = [UnitSums([], {}, device) for _ in self.layers]
        self.similarity = torch.zeros(len(self.layers), device=device)
        readers = list(stream_readers(model).values())
        self.channels = UnitSums(readers, {"stream": 1}, device, width_of(model)) if settings.hidden else None
        self.readers, self.read_later = channel_readers(model, shown) if settings.hidden and shown else ([], [])
        tensors = stream_tensors(model, shown) if settings.hidden_moments and shown else []
        self.stream = {tensor: MomentsSum(width_of(model), device, share) for tensor in tensors}

    def watch(self, batch: CalibrationBatch, stack: ExitStack) -> None:
        """Hook up everything that is summed, until the stack closes."""
        model = self.calibration.model
        for i, module in enumerate(self.taps):
            hook = tap_hook(batch, self.units[i], self.moments[i] if self.moments else None)
            stack.enter_context(module.register_forward_pre_hook(hook))
        if self.channels is not None:
            before = reader_hook(batch, self.channels)
            for reader in self.readers:
                stack.enter_context(reader.register_forward_pre_hook(before))
            for tensor in self.read_later:
                stack.enter_context(seen(model, tensor, partial(see_channels, batch, self.channels)))
        for tensor, its in self.stream.items():
            stack.enter_context(seen(model, tensor, moments_hook(batch, its)))
        for handle in self.gradients.watch(batch) if self.gradients else ():
            stack.enter_context(handle)
        for i, layer in enumerate(self.layers):
            of_layer = layer_hook(batch, self.changes[i], self.similarity, i)
            stack.enter_context(layer.register_forward_hook(of_layer, with_kwargs=True))

    def add_channels(self, batch: CalibrationBatch) -> None:
        """After a batch's backward pass: the effects of its channels, which several tensors have added to."""
        if self.channels is not None and self.calibration.loss is not None:
            self.channels.add_gradients(batch.channels)

    def tensors(self) -> list[torch.Tensor]:
        """All sums."""
        channels = [] if self.channels is None else [self.channels]
        parts: list[UnitSums | MomentsSum] = [
            *self.units,
            *self.changes,
            *channels,
            *self.moments,
            *self.stream.values(),
        ]
        gradients = self.gradients.sums.values() if self.gradients else ()
        return [self.similarity, *gradients, *(tensor for part in parts for tensor in part.tensors())]

    def finish(self, examples: int, tokens: int) -> Statistics:
        """The statistics; the sums are gone then."""
        calibration = self.calibration
        gradients = self.gradients.sums if self.gradients else {}
        weights = unit_weights(calibration.model, calibration.settings.hidden, gradients)
        inside = {kind: self._inside(kind, weights, tokens) for kind in LAYER_UNITS if self._with(kind)}
        whole = {
            kind.name: self._whole(kind, weights)
            for kind in KINDS.values()
            if kind.source and (kind.cuts is None or kind.cuts in inside)
        }
        return Statistics(
            units={**inside, **whole},
            similarity=self.similarity.cpu(),
            moments=finished(self.moments, len(self.taps) // len(self.layers)),
            examples=examples,
            tokens=tokens,
            has_gradients=calibration.loss is not None,
            has_weight_gradients=self.gradients is not None,
            hidden_moments=tuple((tensor, its.finish()) for tensor, its in self.stream.items()),
        )

    def _with(self, kind: str) -> list[UnitSums]:
        """Of every layer the sums that units of a kind are in."""
        return [sums for sums in self.units if kind in sums.sizes]

    def _inside(self, kind: str, weights: UnitWeights, tokens: int) -> tuple[UnitStatistics, ...]:
        """The statistics of a kind of unit inside layers."""
        return tuple(s.finish(kind, w[kind], tokens) for s, w in zip(self._with(kind), weights.layers, strict=True))

    def _whole(self, kind: UnitKind, weights: UnitWeights) -> UnitStatistics:
        """The statistics of a kind by where they come from (see `Source`)."""
        if kind.source == "stream":
            sums = self.channels or UnitSums([], {"stream": 1}, self.calibration.device, 0)
            return sums.finish("stream", weights.hidden, 0)
        if kind.source == "together":
            assert kind.cuts is not None
            sums_of, parts = self._with(kind.cuts), [kind.cuts]
        else:
            sums_of, parts = self.changes, [name for name, unit in LAYER_UNITS.items() if unit.within is None]
        rows = []
        for sums, its in zip(sums_of, weights.layers, strict=True):
            rows.append(sums.block(torch.cat([its[name] for name in parts if name in its], 1)))
        return stacked(rows)
