"""The sections of `teacher` that name teachers which change while a student learns."""

from typing import Any, Literal

from pydantic import Field, model_validator

from distill_llm.common.errors import InputError, raise_all
from distill_llm.recipe.section import Section


class MovingAverageSection(Section):
    """The student learns from an average of its own weights over the steps (mean teacher), in place of `teacher.model`."""

    decay: float = Field(default=0.999, ge=0, lt=1, description="share of the average that stays at every step")
    warm_up: bool = Field(
        default=True,
        description="begin with the plain mean of the weights so far: the share is at most t / (t + 1) after step t",
    )
    as_student: bool = Field(
        default=False, description="save the average as the student, in place of the weights of the last step"
    )


class PeerSection(Section):
    """A further student; either `keep` or `model`."""

    keep: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="share of the cost of the teacher's layers that it keeps, cut by the settings of `pruning`",
    )
    model: str | None = Field(
        default=None,
        min_length=1,
        description="an existing one with the teacher's tokenizer: Hub id, folder, GGUF file, or package://PACKAGE/PATH",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> "PeerSection":
        if (self.keep is None) == (self.model is None):
            given = None if self.keep is None else self.keep
            raise_all([InputError("keep", given, fix="give either `keep`, to cut it from the teacher, or `model`")])
        return self

    @property
    def words(self) -> str:
        """What it is, for tables."""
        return f"keep {self.keep:g}" if self.keep is not None else str(self.model)


class PeersSection(Section):
    """Students that learn together with the run's own, in place of a teacher; a list is short for `others`."""

    others: list[PeerSection] = Field(min_length=1, description="the further students")
    average: Literal["probabilities", "logits"] = Field(
        default="probabilities",
        description="of three students and more: what each learns the mean of; of a regression the values",
    )

    @model_validator(mode="before")
    @classmethod
    def _others_alone(cls, given: Any) -> Any:
        return {"others": given} if isinstance(given, list) else given

    @property
    def cut(self) -> list[int]:
        """The places of those that are cut from the teacher."""
        return [place for place, other in enumerate(self.others) if other.keep is not None]


class AssistantSection(Section):
    """The student of the round before teaches too, from the second round on."""

    share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description="its weight in the mean with the teacher; 1: it teaches alone, in the teacher's place (teacher assistants)",
    )
    average: Literal["probabilities", "logits"] = Field(
        default="probabilities",
        description="what the mean is taken of; with teacher.ensemble, that of the ensemble holds",
    )
