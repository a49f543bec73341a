"""Numbers that may change over training: a plain number, or a schedule read at each optimizer step."""

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.validation import faults_of


class Schedule(BaseModel):
    """From `start` to `end` over a share of training, or over a number of optimizer steps; stays at `end` from then on.

    `linear` is a straight line, `cosine` half a wave, `constant` stays at `start` and then jumps to `end`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    start: float = Field(allow_inf_nan=False, description="the number at the first optimizer step")
    end: float = Field(allow_inf_nan=False, description="the number at the end of the schedule")
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    share: float | None = Field(
        default=None, gt=0, le=1, description="Length as a share of all optimizer steps; left out: 1."
    )
    steps: int | None = Field(default=None, ge=1, description="Length in optimizer steps, in place of a share.")

    @model_validator(mode="after")
    def _one_length(self) -> "Schedule":
        if self.share is not None and self.steps is not None:
            fix = "remove steps or share: both set the length of the schedule"
            raise InputError("steps", self.steps, fix=fix)
        return self

    def at(self, step: int, total: int) -> float:
        """The number of an optimizer step.

        Args:
            step: optimizer steps done before it.
            total: optimizer steps of the whole training; 0 where none has begun.
        """
        length = self.steps if self.steps is not None else (self.share or 1.0) * max(total, 1)
        progress = 1.0 if step >= length else step / length
        if self.schedule == "constant":
            progress = math.floor(progress)
        elif self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress


def value_at(number: float | Schedule, step: int, total: int) -> float:
    """A number or, of a schedule, that of an optimizer step (see `Schedule.at`)."""
    return number.at(step, total) if isinstance(number, Schedule) else number


def largest(number: float | Schedule) -> float:
    """The number, or the larger end of a schedule."""
    return max(number.start, number.end) if isinstance(number, Schedule) else number


def _reader(bound: Callable[[float], bool], words: str) -> Callable[[Any], float | Schedule]:
    def read(given: Any) -> float | Schedule:
        if isinstance(given, Schedule):
            given = given.model_dump()
        if isinstance(given, Mapping):
            return _read_schedule(given)
        try:
            value = math.nan if isinstance(given, bool) else float(given)
        except (TypeError, ValueError):
            value = math.nan
        if not (math.isfinite(value) and bound(value)):
            raise InputError("", given, f"{words}, or a schedule from start to end")
        return value

    def _read_schedule(given: Mapping[str, Any]) -> Schedule:
        try:
            schedule = Schedule.model_validate(given)
        except ValidationError as error:
            raise_all(faults_of(error, Schedule))
            raise
        ends = {"start": schedule.start, "end": schedule.end}
        raise_all([InputError(name, end, words) for name, end in ends.items() if not bound(end)])
        return schedule

    return read


Weight = Annotated[float | Schedule, BeforeValidator(_reader(lambda value: value >= 0, "a number of at least 0"))]
Temperature = Annotated[float | Schedule, BeforeValidator(_reader(lambda value: value > 0, "a number above 0"))]
