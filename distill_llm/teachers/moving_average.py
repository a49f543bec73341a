"""A teacher that is the student itself, averaged over its steps."""

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.losses.signals import Signals, Wanted
from distill_llm.losses.terms.term import Gives
from distill_llm.models.sharing import check_apart
from distill_llm.teachers.online import OnlineTeacher

GIVES = Gives(
    "a moving average of the student",
    ("logits", "hidden", "attention", "vectors", "neurons", "graph"),
    mixtures=True,
)
LOW = (torch.bfloat16, torch.float16)


class MovingAverage(OnlineTeacher):
    """An exponential moving average of the student's weights, which teaches the student (Tarvainen and Valpola 2017).

    After step t, every trained weight of the average becomes $a_t = d_t a_{t-1} + (1 - d_t) w_t$. With `warm_up`,
    $d_t = \\min(d, t / (t + 1))$: at first the average is the plain mean of all weights so far, the initial ones among
    them. Weights that are not trained (under LoRA all but the adapters) are the student's own, held once. The average is
    held in float32; where the student computes in fewer bits, so does the average.

    Args:
        decay: d, the share of the average that stays at a step, from 0 and below 1.
        warm_up: whether it is smaller in the first steps.

    Raises:
        InputError: a decay that is no such share.
    """

    whole_student = True

    def __init__(self, decay: float = 0.999, warm_up: bool = True):
        if not 0 <= decay < 1:
            raise InputError("decay", decay, "a number from 0 and below 1, for example 0.999")
        self.decay, self.warm_up = decay, warm_up
        self._precision: torch.dtype | None = None

    @property
    def gives(self) -> Gives:
        """See `GIVES`."""
        return GIVES

    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """See `Teacher.meet`. The average begins at the student's weights."""
        frozen = {id(each): each for each in student.parameters() if not each.requires_grad}
        super().__init__(copy.deepcopy(student, frozen))
        self._pairs = [
            (own, average)
            for own, average in zip(student.parameters(), self.model.parameters(), strict=True)
            if own is not average
        ]
        self._buffers = list(zip(student.buffers(), self.model.buffers(), strict=True))
        for _, average in self._pairs:
            average.data = average.data.float()
        self._dtype = student.dtype
        check_apart(student, self.model)
        return super().meet(student, tokenizer)

    def place(self, device: torch.device, dtype: torch.dtype | None = None, layers: Wanted | None = None) -> None:
        """See `Teacher.place`; `dtype` is what it computes in: its weights stay in float32, or small changes would be lost."""
        super().place(device, None, layers)
        computed = dtype or self._dtype
        self._precision = computed if computed in LOW else None

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`."""
        device = next(iter(batch.values())).device.type
        with torch.autocast(device, self._precision) if self._precision is not None else nullcontext():
            return super().signals(batch, step, positions, compact)

    def decay_at(self, step: int) -> float:
        """The share of the average that stays at a step, counted from 1."""
        return min(self.decay, step / (step + 1)) if self.warm_up else self.decay

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """See `Teacher.after_step`."""
        change = 1 - self.decay_at(step)
        for own, average in self._pairs:
            average.lerp_(own.detach().to(average), change)
        for theirs, buffer in self._buffers:
            buffer.copy_(theirs)

    def hand_over(self) -> None:
        """Put the average in the place of the student's weights, in the student's own dtype."""
        with torch.no_grad():
            for own, average in self._pairs:
                own.copy_(average)

    def state_dict(self) -> dict[str, Any]:
        """See `Teacher.state_dict`: the weights that are averaged, and the buffers."""
        return {
            "weights": [average.detach() for _, average in self._pairs],
            "buffers": [buffer for _, buffer in self._buffers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Teacher.load_state_dict`."""
        with torch.no_grad():
            for name, held in (("weights", self._pairs), ("buffers", self._buffers)):
                for (_, own), kept in zip(held, state[name], strict=True):
                    own.copy_(kept)
