"""A teacher that is a model in memory: its signals are computed for every batch."""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.modes import named_outputs
from distill_llm.losses.signals import HeadSignals, Signals, Wanted
from distill_llm.losses.terms.term import Gives, Signal
from distill_llm.models.adapters import is_quantized
from distill_llm.models.capture import Recorder
from distill_llm.models.checkpoint import converted
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.item_logits import item_logits, packed
from distill_llm.models.mixing import mixed_embeddings
from distill_llm.models.output_head import OutputHead, output_head
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.compatibility import shared_classes


class OnlineTeacher(Teacher):
    """A frozen model: evaluation mode and no gradient at every call, no part of any optimizer or checkpoint.

    Args:
        model: the teacher, quantised or not. It is read where it is until `place` moves it.

    Attributes:
        head: the output map of a language model that can do without logits (see `output_head`), else None.
    """

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.recorder = Recorder(model, Wanted())

    @cached_property
    def head(self) -> OutputHead | None:
        """See the attributes."""
        return output_head(self.model)

    @property
    def gives(self) -> Gives:
        """Everything."""
        signals: tuple[Signal, ...] = ("logits", "hidden", "attention", "vectors", "neurons", "graph")
        return Gives("a model", signals, writes=True, mixtures=True)

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Where there is a head."""
        return self.head is not None

    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """See `Teacher.meet` and `shared_classes`."""
        return shared_classes(student, self.model, tokenizer)

    def place(self, device: torch.device, dtype: torch.dtype | None = None, layers: Wanted | None = None) -> None:
        """See `Teacher.place`.

        The model is moved; where `dtype` differs from its own, a converted copy is made on the device instead, so it is held
        twice: load it in `dtype` where memory is short. A quantised model stays where it is, in its precision.
        """
        if not is_quantized(self.model):
            if dtype is not None and self.model.dtype != dtype:
                self.model = converted(self.model, dtype, device)
            self.model.to(device)  # type: ignore[arg-type]
        self.__dict__.pop("head", None)
        self.recorder = Recorder(self.model, layers or Wanted())

    def watch(self, layers: Wanted) -> None:
        """See `Teacher.watch`."""
        self.recorder = Recorder(self.model, layers)

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`; what the model's forward does not take of a batch is left out."""
        received: list[torch.Tensor] = []
        self.model.eval()
        with ExitStack() as forward:
            forward.enter_context(torch.set_grad_enabled(self.recorder.wanted.graph))
            forward.enter_context(named_outputs(self.model))
            recording = forward.enter_context(self.recorder.recording())
            forward.enter_context(packed(self.model, positions))
            forward.enter_context(mixed_embeddings(self.model, batch))
            if compact:
                assert self.head is not None
                forward.enter_context(self.head.handing_on(received.append))
            logits = self.model(**forward_inputs(self.model, batch)).logits
        if not compact:
            found = recording.with_logits(item_logits(logits, positions))
            return found.detached() if self.recorder.wanted.graph else found
        assert self.head is not None
        return HeadSignals(
            recording.hidden,
            recording.attention,
            recording.vectors,
            recording.neurons,
            logits=logits,
            head=self.head.head,
            head_inputs=received[0],
        )
