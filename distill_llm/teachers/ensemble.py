"""A teacher that is several models: the student learns from the mean of their outputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, one_of
from distill_llm.data.tasks import class_order, label_names
from distill_llm.losses.items import is_language_model, kind_of
from distill_llm.losses.signals import Signals, Wanted
from distill_llm.losses.terms.term import Gives
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.compatibility import shared_classes
from distill_llm.teachers.online import OnlineTeacher

AVERAGES = ("probabilities", "logits")
GIVES = Gives("an ensemble", ("logits", "hidden", "attention", "vectors", "neurons"), mixtures=True)
"""Signals inside of layers are those of the first model. Their gradient would be that of its own outputs, not of the mean."""


class Ensemble(Teacher):
    """The weighted mean of what several models say. All are held in memory, and each reads every batch.

    With weights $w_m$ that sum to 1, `probabilities` gives $\\log \\sum_m w_m p_m$, and `logits` gives $\\sum_m w_m z_m$, whose
    softmax is the normalised geometric mean of the models'. A temperature divides this mean. Classes are matched by
    their names, so models may have them in any order. The mean of models with a single output (a regression) is that
    of their values.

    Args:
        models: two or more with the student's kind of head, classes and vocabulary. Terms that look inside of layers compare
            the student with the first.
        weights: a positive number for each model; they are divided by their sum. None: equal ones.
        average: what the mean is taken of.
        confidence: whether each output multiplies a model's weight by exp(-H), where H is the entropy of the model's
            distribution: a model that is sure counts for more.

    Attributes:
        weights: their sum is 1.

    Raises:
        InputError: fewer than two models, or weights that do not fit them.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        weights: Sequence[float] | None = None,
        average: Literal["probabilities", "logits"] = "probabilities",
        confidence: bool = False,
    ):
        if len(models) < 2:
            raise InputError("models", f"{len(models)} models", "at least two: a single one is a teacher as it is")
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models) or not all(0 < weight < math.inf for weight in weights):
            raise InputError("weights", weights, f"{len(models)} numbers above 0, one for each model")
        if average not in AVERAGES:
            raise InputError("average", average, one_of(AVERAGES, str(average)))
        self.members = [OnlineTeacher(model) for model in models]
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.average, self.confidence = average, confidence
        self._classes: int | None = None
        self._single = False
        self._orders: list[torch.Tensor | None] = [None] * len(models)

    @property
    def model(self) -> PreTrainedModel:  # type: ignore[override]
        """The first, whose layers are compared with the student's."""
        return self.members[0].model

    @property
    def gives(self) -> Gives:
        """See `GIVES`."""
        return GIVES

    @property
    def readers(self) -> tuple[PreTrainedModel, ...]:
        """All of them."""
        return tuple(member.model for member in self.members)

    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """See `Teacher.meet`; each model must fit the student, in any order of classes."""
        shared = []
        self._single = kind_of(student) == "example" and student.config.num_labels == 1
        if self._single and self.confidence:
            raise InputError("confidence", True, fix="leave it out: a single output has no entropy (a regression)")
        named = [names for model in (student, *self.readers) if (names := label_names(model.config))]
        for number, member in enumerate(self.members):
            field = f"models.{number}"
            try:
                shared.append(shared_classes(student, member.model, tokenizer, any_order=True))
            except InputError as error:
                raise error.renamed(field) from None
            if named and not is_language_model(student):
                name = type(member.model).__name__
                order = class_order(label_names(member.model.config), named[0], field, name)
                self._orders[number] = None if order is None else torch.tensor(order)
        self._classes = min((count for count in shared if count is not None), default=None)
        return self._classes

    def place(self, device: torch.device, dtype: torch.dtype | None = None, layers: Wanted | None = None) -> None:
        """See `Teacher.place` and `OnlineTeacher.place`; layers are recorded of the first model."""
        for number, member in enumerate(self.members):
            member.place(device, dtype, None if number else layers)
        self._orders = [None if order is None else order.to(device) for order in self._orders]

    @property
    def _adds(self) -> bool:
        """Whether probabilities are added, in logarithms."""
        return self.average == "probabilities" and not self._single

    def _share(self, logits: torch.Tensor, weight: float) -> torch.Tensor:
        """The logarithm of a model's weight in each row, (items, 1) before all weights of the row are made to sum to 1."""
        share = logits.new_full((len(logits), 1), math.log(weight))
        return share - torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True) if self.confidence else share

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`. Two sets of whole logits in fp32 are held, however many models there are."""
        first: Signals | None = None
        total = norm = torch.tensor(0.0)
        for number, member in enumerate(self.members):
            if first is not None and positions is not None and not len(positions):
                return first  # no output is asked for
            found = member.signals(batch, step, positions)
            logits = found.logits[..., : self._classes].float()
            if (order := self._orders[number]) is not None:
                logits = logits[..., order]
            share = self._share(logits, self.weights[number])
            part = logits.log_softmax(-1) + share if self._adds else logits * share.exp()
            if first is None:
                first, total, norm = found, part, share
            else:
                total = torch.logaddexp(total, part) if self._adds else total + part
                norm = torch.logaddexp(norm, share)
            del found, logits, part
        assert first is not None
        return replace(first, logits=total - norm if self._adds else total / norm.exp())
