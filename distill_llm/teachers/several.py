"""What teachers that are several models have in common: each fits the student, and gives its logits in the student's order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.data.tasks import class_order, label_names
from distill_llm.losses.items import is_language_model, kind_of
from distill_llm.losses.signals import Signals, Wanted
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.compatibility import shared_classes
from distill_llm.teachers.online import OnlineTeacher


class Several(Teacher):
    """Several models with the student's kind of head, classes and vocabulary; a subclass says what they teach together.

    Classes are matched by their names, so models may have them in any order. Terms that look inside of layers compare the
    student with the first model.

    Args:
        models: two or more; an OnlineTeacher, such as a ShelvedTeacher, stands for its model.

    Attributes:
        members: a teacher for each model.
        single: whether the models have a single output, the value of a regression; known once they have met a student.
        looks_inside: whether signals inside of layers are wanted of the first.

    Raises:
        InputError: fewer than two.
    """

    def __init__(self, models: Sequence[PreTrainedModel | OnlineTeacher]):
        if len(models) < 2:
            raise InputError("models", f"{len(models)} models", "at least two: a single one is a teacher as it is")
        self.members = [model if isinstance(model, OnlineTeacher) else OnlineTeacher(model) for model in models]
        self._classes: int | None = None
        self.single = self.looks_inside = False
        self._orders: list[torch.Tensor | None] = [None] * len(models)

    @property
    def model(self) -> PreTrainedModel:  # type: ignore[override]
        """The first, whose layers are compared with the student's."""
        return self.members[0].model

    @property
    def readers(self) -> tuple[PreTrainedModel, ...]:
        """All of them."""
        return tuple(member.model for member in self.members)

    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """See `Teacher.meet`; each model must fit the student, in any order of classes."""
        return self._agree(student, tokenizer, 0)

    def agree(self, tokenizer: Any = None, names: Sequence[str] | None = None) -> int | None:
        """As `meet` where there is no student: the models must fit the first, whose order of classes is that of the logits.

        Args:
            names: of the classes, in the order of the labels, for a first model that has none.
        """
        return self._agree(self.members[0].model, tokenizer, 1, names)

    def _agree(
        self, student: PreTrainedModel, tokenizer: Any, first: int, names: Sequence[str] | None = None
    ) -> int | None:
        shared = []
        self.single = kind_of(student) == "example" and student.config.num_labels == 1
        own = [label_names(model.config) for model in (student, *self.readers)]
        named = [each for each in (own[0], names, *own[1:]) if each]
        for number, member in enumerate(self.members[first:], first):
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
        self.looks_inside = layers is not None and bool(
            layers.hidden or layers.attention or layers.vectors or layers.neurons
        )
        for number, member in enumerate(self.members):
            member.place(device, dtype, None if number else layers)
        self._orders = [None if order is None else order.to(device) for order in self._orders]

    def watch(self, layers: Wanted) -> None:
        """See `Teacher.watch`; of the first model."""
        self.members[0].watch(layers)

    def outputs(
        self, number: int, batch: Mapping[str, torch.Tensor], step: int = 0, positions: torch.Tensor | None = None
    ) -> Signals:
        """The signals of one model, logits in fp32 in the student's order of classes."""
        found = self.members[number].signals(batch, step, positions)
        logits = found.logits[..., : self._classes].float()
        if (order := self._orders[number]) is not None:
            logits = logits[..., order]
        return replace(found, logits=logits)
