"""Students that learn together: each is taught by the others."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import combinations
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.modes import named_outputs
from distill_llm.common.errors import InputError, one_of
from distill_llm.losses.items import kind_of
from distill_llm.losses.signals import Signals, Wanted
from distill_llm.losses.terms.term import Gives
from distill_llm.models.adapters import is_quantized, without_adapters
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.item_logits import item_logits, packed
from distill_llm.models.mixing import mixed_embeddings
from distill_llm.models.sharing import check_apart
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.compatibility import shared_classes

AVERAGES = ("probabilities", "logits")
GIVES = Gives("peers of the student", mixtures=True)
"""Outputs alone: what is inside of peers of other sizes has no counterpart."""


class Peers(Teacher):
    """Further students, trained in the same steps (deep mutual learning, Zhang et al. 2018).

    Every one, the trainer's own student among them, has the whole objective: its labels, and the others as its teacher.
    Of two, each learns from the other. Of more, each learns from the mean of the others' outputs (codistillation, Anil et
    al. 2018). All take their step at once, from the outputs of the same forward passes in training mode: learning
    together takes no forward more than learning apart. What one learns from carries no gradient.

    Args:
        models: one or more, with the student's kind of head, classes and vocabulary, of any size. They are trained in
            place, by the trainer's optimizer, schedule and precision.
        average: what the mean of several is taken of. With `probabilities`, the divergence `forward_kl` at temperature 1
            has the gradient of the mean of its values to each of the others.

    Raises:
        InputError: no models, or one that cannot be trained.
    """

    whole_student = True

    def __init__(
        self, models: Sequence[PreTrainedModel], average: Literal["probabilities", "logits"] = "probabilities"
    ):
        if not models:
            raise InputError("models", "no models", "at least one: the student is not among them")
        if average not in AVERAGES:
            raise InputError("average", average, one_of(AVERAGES, str(average)))
        for number, model in enumerate(models):
            if without_adapters(model) is not model or is_quantized(model):
                given = "adapters" if without_adapters(model) is not model else "quantised weights"
                raise InputError(
                    f"models.{number}", f"a model with {given}", "a plain model: all weights of peers learn"
                )
        self.models, self.average = list(models), average
        self._precision: torch.dtype | None = None
        self._classes: int | None = None
        self._single = False
        self._logits: list[torch.Tensor] = []

    @property
    def gives(self) -> Gives:
        """See `GIVES`."""
        return GIVES

    @property
    def readers(self) -> tuple[PreTrainedModel, ...]:
        """All of them."""
        return tuple(self.models)

    @property
    def learners(self) -> Sequence[PreTrainedModel]:
        """See `Teacher.learners`: all of them."""
        return self.models

    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """See `Teacher.meet`; all must fit the student, and no two may share weights."""
        shared = []
        self._single = kind_of(student) == "example" and student.config.num_labels == 1
        for number, model in enumerate(self.models):
            try:
                shared.append(shared_classes(student, model, tokenizer))
                check_apart(model, student)
            except InputError as error:
                raise error.renamed(f"models.{number}") from None
        for one, other in combinations(range(len(self.models)), 2):
            try:
                check_apart(self.models[one], self.models[other])
            except InputError as error:
                raise error.renamed(f"models.{one}") from None
        self._classes = min((count for count in shared if count is not None), default=None)
        return self._classes

    def place(self, device: torch.device, dtype: torch.dtype | None = None, layers: Wanted | None = None) -> None:
        """See `Teacher.place`; `dtype` is that of mixed precision: the weights stay as they are."""
        for model in self.models:
            model.to(device)  # type: ignore[arg-type]
        self._precision = dtype if dtype in (torch.bfloat16, torch.float16) else None

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`. The outputs are kept with their graph until `exchange`."""
        self._logits = []
        for model in self.models:
            model.train()
            with ExitStack() as forward:
                if self._precision is not None:
                    device = next(iter(batch.values())).device.type
                    forward.enter_context(torch.autocast(device, self._precision))
                forward.enter_context(named_outputs(model))
                forward.enter_context(packed(model, positions))
                forward.enter_context(mixed_embeddings(model, batch))
                logits = model(**forward_inputs(model, batch)).logits
            self._logits.append(item_logits(logits, positions).float())
        return Signals(logits=self._mean(self._logits))

    def exchange(self, own: Signals) -> list[tuple[Signals, Signals]]:
        """See `Teacher.exchange`."""
        found, self._logits = self._logits, []
        others = [[own.logits, *found[:number], *found[number + 1 :]] for number in range(len(found))]
        return [
            (Signals(logits=logits), Signals(logits=self._mean(rest)))
            for logits, rest in zip(found, others, strict=True)
        ]

    def _mean(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """What is learnt from some of the students' outputs, (items, classes) in fp32, without gradient."""
        given = [each.detach().float()[..., : self._classes] for each in logits]
        if len(given) == 1:
            return given[0]
        if self._single or self.average == "logits":
            return torch.stack(given).mean(0)
        return torch.stack([each.log_softmax(-1) for each in given]).logsumexp(0) - math.log(len(given))
