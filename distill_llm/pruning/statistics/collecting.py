"""One pass over calibration data that collects every statistic of every unit.

Weights are frozen. Hooks on the attention-output and FFN-down linears see their inputs a and, through the backward pass, the
gradients g of the loss there. Hooks on the linears that read the residual stream, and on its last norm, do the same for its
channels. Padding does not count (`attention_mask`).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of, layers_of, width_of
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
from distill_llm.pruning.statistics.magnitudes import unit_weights
from distill_llm.pruning.statistics.moments import Moments, MomentsSum
from distill_llm.pruning.statistics.processes import sum_over_processes
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.statistics.stream import channel_readers, seen, stream_readers, stream_tensors
from distill_llm.pruning.statistics.unit_sums import UnitSums, stacked
from distill_llm.pruning.units.sizes import counts_of, head_size_of, linear, weight_of


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
    """
    calibration = CalibrationPass(model, loss, teacher, settings)
    shown, batches = first_of(dataloader)  # on every process, whoever collects of it
    sums = _PassSums(calibration, shown)
    batch = calibration.batch()
    with ExitStack() as stack:
        # Gradients of all channels, or of what every layer reads, go all the way back to the embeddings.
        from_embeddings = settings.hidden or settings.hidden_moments or settings.checkpointing
        stack.enter_context(calibration.prepared(from_embeddings))
        sums.watch(batch, stack)
        examples, tokens = calibration.over(batches, batch, partial(sums.add_channels, batch))
    if settings.sharded:
        sum_over_processes(sums.tensors())
    return sums.finish(examples, tokens)


class _PassSums:
    """The running sums of a pass over a model, and the hooks that fill them.

    Args:
        shown: a batch of the data, to find what reads and writes the residual stream; None where there is none.
    """

    def __init__(self, calibration: CalibrationPass, shown: Mapping[str, torch.Tensor] | None):
        model, settings, device = calibration.model, calibration.settings, calibration.device
        self.calibration, self.layers, family = calibration, layers_of(model), family_of(model)
        head_size, share = head_size_of(model), settings.moment_share
        self.taps: list[nn.Linear | Conv1D] = []  # the attention-output and the FFN-down linear of each layer in turn
        self.units: list[UnitSums] = []
        for layer, counts in zip(self.layers, counts_of(model), strict=True):
            out, down = (linear(layer, path) for path, _ in family.readers)
            queries = counts["queries"] // counts["heads"] if counts["heads"] else 1
            self.taps += [out, down]
            self.units += [UnitSums([out], (head_size, head_size * queries), device), UnitSums([down], (1,), device)]
        moments = self.taps if settings.moments else []
        self.moments = [MomentsSum(weight_of(module).shape[1], device, share) for module in moments]
        self.whole_layers = [UnitSums([], (1,), device) for _ in self.layers]
        self.similarity = torch.zeros(len(self.layers), device=device)
        readers = list(stream_readers(model).values())
        self.channels = UnitSums(readers, (1,), device, width_of(model)) if settings.hidden else None
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
        for i, layer in enumerate(self.layers):
            of_layer = layer_hook(batch, self.whole_layers[i], self.similarity, i)
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
            *self.whole_layers,
            *channels,
            *self.moments,
            *self.stream.values(),
        ]
        return [self.similarity, *(tensor for part in parts for tensor in part.tensors())]

    def finish(self, examples: int, tokens: int) -> Statistics:
        """The statistics; the sums are gone then."""
        calibration = self.calibration
        weights = unit_weights(calibration.model, hidden=calibration.settings.hidden)
        moments = self._finished_moments()
        pairs = list(zip(self.units[0::2], self.units[1::2], weights.layers, strict=True))
        whole = [[(w["heads"][i].sum() + w["neurons"][i].sum())[None] for i in (0, 1)] for w in weights.layers]
        return Statistics(
            heads=tuple(s.finish(-1, *w["heads"]) for s, _, w in pairs),
            neurons=tuple(s.finish(0, *w["neurons"]) for _, s, w in pairs),
            queries=tuple(s.finish(0, *w["queries"]) for s, _, w in pairs),
            layers=stacked([s.finish(0, *w) for s, w in zip(self.whole_layers, whole, strict=True)]),
            attention=stacked([s.block(*w["heads"]) for s, _, w in pairs]),
            ffn=stacked([s.block(*w["neurons"]) for _, s, w in pairs]),
            hidden=(self.channels or UnitSums([], (1,), calibration.device, 0)).finish(0, *weights.hidden),
            similarity=self.similarity.cpu(),
            moments=tuple(zip(moments[0::2], moments[1::2], strict=True)),
            examples=examples,
            tokens=tokens,
            has_gradients=calibration.loss is not None,
            hidden_moments=tuple((tensor, its.finish()) for tensor, its in self.stream.items()),
        )

    def _finished_moments(self) -> list[Moments]:
        """In the order of the taps; the sums of each are freed before the next is made."""
        waiting, self.moments = self.moments[::-1], []
        return [waiting.pop().finish() for _ in range(len(waiting))]
