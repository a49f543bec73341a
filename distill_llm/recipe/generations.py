"""The section `distillation.generations`: students that teach each other one after the other."""

from typing import Any

from pydantic import Field, model_validator

from distill_llm.recipe.section import Section


class GenerationsSection(Section):
    """Born-again students: each begins anew and learns from the one before; a number is short for `count`."""

    count: int = Field(ge=2, description="how many students; the first learns from the teacher")
    ensemble: bool = Field(
        default=False,
        description="score the mean of all of them too (classes and values; the student stays a single model)",
    )

    @model_validator(mode="before")
    @classmethod
    def _count_alone(cls, given: Any) -> Any:
        return {"count": given} if isinstance(given, int) and not isinstance(given, bool) else given
