"""The section `exits`: heads after some of the student's layers, by which rows leave early or a language model drafts."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_llm.common.errors import InputError
from distill_llm.losses.objective import Objective
from distill_llm.recipe.section import Section
from distill_llm.recipe.sections import StudentSection


class ExitsSection(Section):
    """Exits of the student, which learn in the last recovery (the loss `exits`); a list of numbers is short for `after`."""

    after: list[int] = Field(
        min_length=1,
        description="numbers of layers before each exit, in rising order; the last layer keeps its head",
    )
    threshold: float | Literal["auto"] = Field(
        default="auto",
        description="of a classifier: largest probability above which a row leaves; auto: the one with the fewest layers on"
        " held-out rows (data.holdout_examples) whose score there is within `within` of the whole model's",
    )
    within: float = Field(
        default=1.0,
        ge=0,
        allow_inf_nan=False,
        description="with auto: how many standard errors the score on held-out rows may be worse than that of all layers",
    )

    @model_validator(mode="before")
    @classmethod
    def _after_alone(cls, given: Any) -> Any:
        return {"after": given} if isinstance(given, list) else given

    @field_validator("threshold", mode="before")
    @classmethod
    def _a_probability(cls, given: Any) -> Any:
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if given != "auto" and not (number and 0 <= given < 1):
            raise InputError("", given, "auto, or a number of at least 0 and below 1")
        return given


def with_loss(given: dict[str, Any]) -> dict[str, Any]:
    """A recipe's mapping with the loss `exits` at its defaults, where it has exits and names losses without it."""
    learnt = given.get("distillation")
    if given.get("exits") is None or not isinstance(learnt, dict):
        return given
    losses = learnt.get("losses", {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}})
    if not isinstance(losses, dict) or "exits" in losses:
        return given
    return {**given, "distillation": {**learnt, "losses": {**losses, "exits": {}}}}


def exit_section_faults(
    exits: ExitsSection | None, losses: Objective | None, student: StudentSection | None, beside: Mapping[str, Any]
) -> list[InputError]:
    """What the sections of a recipe say of exits that does not go together.

    Args:
        beside: by field, sections that exits do not go with, as they were given.
    """
    field, taught = "distillation.losses.exits", losses is not None and "exits" in losses.terms()
    if exits is None:
        fix = "remove it, or add a section exits, for example exits: [3, 6]"
        return [InputError(field, losses.terms()["exits"].weight, fix=fix)] if losses is not None and taught else []
    fix = "remove it, or remove exits: these two do not go together"
    faults = [InputError(name, "a section", fix=fix) for name, given in beside.items() if given is not None]
    if losses is None:
        faults.append(
            InputError("exits", exits.after, fix="remove it, or add a distillation section: exits must learn")
        )
    elif not taught:
        faults.append(InputError(field, None, fix="leave it out, for its defaults: exits must learn"))
    elif len(losses.terms()) == 1:
        faults.append(
            InputError("distillation.losses", "exits alone", fix="add labels or logits, for the deepest head")
        )
    if student is not None and student.peft is not None:
        fix = "remove it, or remove exits: their heads and the layers below them learn whole"
        faults.append(InputError("student.peft", student.peft, fix=fix))
    return faults
