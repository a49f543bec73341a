"""A model's forward and backward passes over calibration data, for hooks to look at."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modes import evaluating, frozen
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.finite import NotFinite
from distill_llm.losses.items import check_tokens_known, valid_tokens
from distill_llm.models.adapters import unmerged_faults
from distill_llm.models.limits import batch_faults, limits_of
from distill_llm.models.placement import check_in_memory, checkpointed, streamed
from distill_llm.pruning.statistics.calibration_loss import Loss, calibration_loss
from distill_llm.pruning.statistics.fast_backward import fast_backward
from distill_llm.pruning.statistics.hooks import CalibrationBatch
from distill_llm.pruning.statistics.processes import process
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings

CALIBRATE = "calibrate a model with finite outputs, in float32 or bfloat16: in float16 it may overflow"
"""What to do about numbers of a calibration pass that are not finite."""

Batches = Iterable[Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class CalibrationPass:
    """A model, and how it sees calibration data.

    Attributes:
        model, loss, teacher: see `collect_statistics`.
        settings: how the pass runs.

    Raises:
        InputError: another loss, gradients on another device without checkpointing, or a model that is offloaded or spread
            over devices.
    """

    model: PreTrainedModel
    loss: Loss | None = "labels"
    teacher: PreTrainedModel | None = None
    settings: CalibrationSettings = DEFAULT_SETTINGS

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in ("labels", "kl"):
            raise InputError("loss", self.loss, "labels, kl, a callable (outputs, batch) -> tensor, or None")
        if self.settings.device is not None and self.loss is not None and not self.settings.checkpointing:
            raise InputError("checkpointing", False, "true: on another device, gradients are taken one layer at a time")
        raise_all(unmerged_faults(self.model))
        check_in_memory(self.model, one_device=True)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.settings.device_for(self.model)

    def batch(self) -> CalibrationBatch:
        """The batch that hooks look at; `over` sets it."""
        return CalibrationBatch(self.device, self.loss is not None)

    @contextmanager
    def prepared(self, from_embeddings: bool) -> Iterator[None]:
        """Within the context the weights are frozen, and the backward pass is as cheap as the settings allow.

        Args:
            from_embeddings: gradients go all the way back to the embeddings. Otherwise they end at the first tensor that a
                hook asks a gradient of.
        """
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            if self.teacher is not None:
                stack.enter_context(evaluating(self.teacher))
            if self.device != self.model.device:
                stack.enter_context(streamed(self.model, layers_of(self.model), self.device))
            if self.loss is not None:
                if from_embeddings:
                    embeddings = self.model.get_input_embeddings()
                    stack.enter_context(embeddings.register_forward_hook(lambda m, a, o: o.detach().requires_grad_()))
                if not self.settings.exact and self.settings.precision is None:
                    stack.enter_context(fast_backward(layers_of(self.model), self.device))
                if self.settings.checkpointing:
                    stack.enter_context(checkpointed(layers_of(self.model)))
            yield

    def over(
        self, batches: Batches, looked_at: CalibrationBatch, after: Callable[[], None] = lambda: None
    ) -> tuple[int, int]:
        """One pass over the data.

        Args:
            batches: `input_ids` (of images `pixel_values`) and `attention_mask`, and labels where the loss needs them.
            looked_at: set to each batch before its forward pass.
            after: called after the backward pass of each batch.

        Returns:
            the numbers of examples and of tokens of all processes, padding left out.

        Raises:
            InputError: a row is longer than the model's positions.
            NotFinite: a batch's loss is nan or infinite.
        """
        device, settings, generator = self.device, self.settings, torch.Generator(device=self.device)
        rank, processes = process() if settings.sharded else (0, 1)
        autocast = torch.autocast(device.type, settings.precision, enabled=settings.precision is not None)
        examples = tokens = 0
        limits = limits_of(self.model.config, type(self.model).__name__)
        for number, batch in enumerate(batches):
            raise_all(batch_faults(limits, batch, "dataloader"))
            check_tokens_known(batch, "dataloader")
            mask, before = valid_tokens(batch), tokens
            examples, tokens = examples + len(mask), tokens + int(mask.sum())
            if number % processes != rank:
                continue
            # Each batch has random numbers of its own, so that they are the same whichever process sees it.
            generator.manual_seed((settings.seed + 1) * 1_000_003 + number)
            looked_at.set(mask, before, generator)
            batch = {name: value.to(device) for name, value in batch.items()}
            with torch.set_grad_enabled(self.loss is not None), autocast:
                total = calibration_loss(self.model, batch, self.loss, self.teacher, generator)
            if total is not None:
                if not total.isfinite():
                    raise NotFinite(f"the loss of batch {number + 1}", str(total.item()), CALIBRATE, stage="statistics")
                total.backward()
            after()
        return examples, tokens


def first_of(batches: Batches) -> tuple[Mapping[str, torch.Tensor] | None, Batches]:
    """The first batch (None where there is none), and all batches with it."""
    rest = iter(batches)
    shown = list(islice(rest, 1))
    return (shown[0] if shown else None), chain(shown, rest)
