"""The section `data.answers`: which of a teacher's answers to a prompt are learnt."""

from typing import Literal

from pydantic import Field, model_validator

from distill_llm.common.errors import InputError
from distill_llm.recipe.section import Section


class AnswersSection(Section):
    """Answers chosen by how likely they are to the teacher that gave them (`distill-llm respond --samples`)."""

    top: int | None = Field(
        default=None, ge=1, description="number of answers to each prompt, the likeliest ones; left out: any number"
    )
    at_least: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="smallest log-probability of an answer, in nats; left out: any",
    )
    by: Literal["mean", "sum"] = Field(
        default="mean",
        description="what of an answer's tokens is compared: the mean of their log-probabilities, or the sum",
    )

    @model_validator(mode="after")
    def _chooses(self) -> "AnswersSection":
        if self.top is None and self.at_least is None:
            raise InputError("", self.model_dump(), "top, at_least or both: without them all answers are kept")
        return self
