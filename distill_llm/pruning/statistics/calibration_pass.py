"""A model's forward and backward passes over calibration data, for hooks to look at."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modes import frozen
from distill_llm.common.errors import InputError
from distill_llm.losses.items import valid_tokens
from distill_llm.models.placement import check_in_memory, checkpointed, streamed
from distill_llm.pruning.statistics.calibration_loss import Loss, calibration_loss
from distill_llm.pruning.statistics.fast_backward import fast_backward
from distill_llm.pruning.statistics.hooks import CalibrationBatch
from distill_llm.pruning.statistics.processes import process

Batches = Iterable[Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class CalibrationPass:
    """How a model sees calibration data; the fields are those of `collect_statistics`.

    Raises:
        InputError: for another loss, or a model that is offloaded or spread over devices.
    """

    model: PreTrainedModel
    loss: Loss | None = "labels"
    teacher: PreTrainedModel | None = None
    exact: bool = False
    precision: torch.dtype | None = None
    checkpointing: bool = False
    seed: int = 0
    sharded: bool = False
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if isinstance(self.loss, str) and self.loss not in ("labels", "kl"):
            raise InputError("loss", self.loss, "labels, kl, a callable (outputs, batch) -> tensor, or None")
        if self.device is not None and self.loss is not None and not self.checkpointing:
            raise InputError(
                "checkpointing", False, "true where gradients are taken a layer at a time on another device"
            )
        check_in_memory(self.model, one_device=True)

    @property
    def at(self) -> torch.device:
        """Where the model computes."""
        return self.device or self.model.device

    def batch(self) -> CalibrationBatch:
        """What hooks look at."""
        return CalibrationBatch(self.at, self.loss is not None)

    @contextmanager
    def prepared(self, from_embeddings: bool) -> Iterator[None]:
        """Within the context weights are frozen and the backward pass is the cheapest there is.

        Args:
            from_embeddings: gradients go back to the very embeddings, not only to where a hook lets them begin.
        """
        with ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            if self.at != self.model.device:
                stack.enter_context(streamed(self.model, layers_of(self.model), self.at))
            if self.loss is not None:
                if from_embeddings:
                    embeddings = self.model.get_input_embeddings()
                    stack.enter_context(embeddings.register_forward_hook(lambda m, a, o: o.detach().requires_grad_()))
                if not self.exact and self.precision is None:
                    stack.enter_context(fast_backward(layers_of(self.model), self.at))
                if self.checkpointing:
                    stack.enter_context(checkpointed(layers_of(self.model)))
            yield

    def over(
        self, batches: Batches, looked_at: CalibrationBatch, after: Callable[[], None] = lambda: None
    ) -> tuple[int, int]:
        """One pass over the data.

        Args:
            batches: `input_ids` and `attention_mask`, and labels where the loss needs them.
            looked_at: set to each batch before its forward.
            after: called when a batch has been seen, its backward pass included.

        Returns:
            the numbers of examples and of tokens, padding left out, of all processes.
        """
        device, generator = self.at, torch.Generator(device=self.at)
        rank, processes = process() if self.sharded else (0, 1)
        autocast = torch.autocast(device.type, self.precision, enabled=self.precision is not None)
        examples = tokens = 0
        for number, batch in enumerate(batches):
            mask, before = valid_tokens(batch), tokens
            examples, tokens = examples + len(mask), tokens + int(mask.sum())
            if number % processes != rank:
                continue
            # A batch's own random numbers: they are the same whichever process sees it.
            generator.manual_seed((self.seed + 1) * 1_000_003 + number)
            looked_at.set(mask, before, generator)
            batch = {name: value.to(device) for name, value in batch.items()}
            with torch.set_grad_enabled(self.loss is not None), autocast:
                total = calibration_loss(self.model, batch, self.loss, self.teacher, generator)
            if total is not None:
                total.backward()
            after()
        return examples, tokens


def first_of(batches: Batches) -> tuple[Mapping[str, torch.Tensor] | None, Batches]:
    """The first batch, None of none, and all of them."""
    rest = iter(batches)
    shown = list(islice(rest, 1))
    return (shown[0] if shown else None), chain(shown, rest)
