"""A teacher at stages of its own training: its weights change at given steps of the student's."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.losses.signals import Signals
from distill_llm.models.adapters import is_quantized
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.teachers.online import OnlineTeacher

Start = int | float
"""When a checkpoint begins to teach: a whole number of steps done, or a share of the training, from 0 and below 1."""


class StagedTeacher(OnlineTeacher):
    """A model that gets other weights in the course of the training (multi-step distillation: PocketNet, Boutros et al. 2022).

    A student that begins with an early teacher has less to catch up with at a time. One set of weights is in memory: the next is
    read when its step comes. A resumed training reads those of its step.

    Args:
        model: teaches until the first of the others begins. It gets their weights.
        later: by start, a folder or a Hub id with weights of the same shapes.
        trust_remote_code: run the code that these bring along, where the model's class is not one of transformers.

    Raises:
        InputError: no others, a start that is none, or quantised weights.
    """

    def __init__(
        self, model: PreTrainedModel, later: Mapping[Start, str | os.PathLike], trust_remote_code: bool = False
    ):
        super().__init__(model)
        if not later:
            raise InputError("later", "no checkpoints", "at least one: a model that stays as it is needs no stages")
        if is_quantized(model):
            raise InputError("model", "a quantised model", "one in floating point: its weights are replaced")
        for start in later:
            check_start(start, "later")
        self.later = {start: str(folder) for start, folder in later.items()}
        self.trust_remote_code = trust_remote_code
        self._starts = starts_in(self.later, None)
        self._held: str | None = None  # the checkpoint whose weights the model has; None: its own

    def begin(self, steps: int) -> None:
        """See `Teacher.begin`: shares of the training become steps.

        Raises:
            InputError: two checkpoints would begin at the same step.
        """
        self._starts = starts_in(self.later, steps)
        if len(self._starts) < len(self.later):
            fix = f"give fewer, or train for more steps than {steps}: two begin at the same step"
            raise InputError("teacher.checkpoints", list(self.later), fix=fix)

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`; the weights are those of the last start that is not after `step`."""
        due = [start for start in self._starts if start <= step]
        if (folder := self._starts[max(due)] if due else None) != self._held:
            self._become(folder)
        return super().signals(batch, step, positions, compact)

    def _become(self, folder: str | None) -> None:
        """Take the weights of a checkpoint; None: those that the model came with, which are no longer there."""
        if folder is None:
            fix = "make the teacher anew: its first weights were replaced in an earlier training"
            raise InputError("teacher", type(self).__name__, fix=fix)
        weights = load_pretrained(folder, self.trust_remote_code, dtype=self.model.dtype).state_dict()
        check_shapes(self.model.state_dict(), weights, "teacher.checkpoints", folder)
        with torch.no_grad():
            for name, own in self.model.state_dict().items():
                own.copy_(weights[name])
        self._held = folder


def starts_in(later: Mapping[Start, str], steps: int | None) -> dict[int, str]:
    """By step, the checkpoint that begins there, in a training of so many steps; None: not known, shares are left out."""
    found: dict[int, str] = {}
    for start, folder in sorted(later.items()):
        share = isinstance(start, float)
        if share and steps is None and start > 0:
            continue
        found[round(start * (steps or 0)) if share else int(start)] = folder
    return found


def check_start(start: Any, field: str) -> None:
    """Refuse what is neither a number of steps nor a share of a training.

    Raises:
        InputError: names the field.
    """
    share = isinstance(start, float) and 0 <= start < 1
    if isinstance(start, bool) or not (share or (isinstance(start, int) and start >= 0)):
        raise InputError(field, start, "a whole number of steps, or a share of the training from 0 and below 1")


def check_shapes(own: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], field: str, name: str) -> None:
    """Refuse weights that do not fit in the place of others.

    Raises:
        InputError: a weight is missing, is one too many, or has another shape.
    """
    shapes = [{key: tuple(each.shape) for key, each in weights.items()} for weights in (own, other)]
    unlike = [key for key in {**shapes[0], **shapes[1]} if shapes[0].get(key) != shapes[1].get(key)]
    if unlike:
        given = f"{name}, where {unlike[0]} is {shapes[1].get(unlike[0], 'missing')}"
        raise InputError(field, given, f"weights of the teacher's own shapes ({shapes[0].get(unlike[0], 'none such')})")
