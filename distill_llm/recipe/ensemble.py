"""The section `teacher.ensemble`: models that teach together with `teacher.model`."""

from typing import Literal

from pydantic import Field

from distill_llm.recipe.section import Section


class MemberSection(Section):
    """A further teacher."""

    model: str = Field(
        min_length=1,
        description="Hub id, folder, GGUF file, or package://PACKAGE/PATH, with the tokenizer of teacher.model, already"
        " trained for the task; its classes have the same names, in any order",
    )
    weight: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="weight in the mean; weights are divided by their sum"
    )


class EnsembleSection(Section):
    """Further teachers: the student learns from a weighted mean of the outputs of all, each held in memory.

    The student is cut from `teacher.model` alone, and losses of layers compare it with that."""

    others: list[MemberSection] = Field(min_length=1, description="the further teachers")
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False, description="weight of teacher.model in the mean")
    average: Literal["probabilities", "logits"] = Field(
        default="probabilities", description="what the mean is taken of; of a regression it is always the values"
    )
    confidence: bool = Field(
        default=False,
        description="multiply a teacher's weight in each output by exp(-entropy) of its distribution: one that is sure"
        " counts for more",
    )

    @property
    def weights(self) -> list[float]:
        """Of `teacher.model` and the others, as given."""
        return [self.weight, *(member.weight for member in self.others)]
