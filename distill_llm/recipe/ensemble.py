"""The section `teacher.ensemble`: models that teach together with `teacher.model`."""

from typing import Any, Literal

from pydantic import Field, model_validator

from distill_llm.common.errors import InputError, raise_all
from distill_llm.recipe.section import Section

TEACHES = (
    "names in the column data.columns.teacher_of: of the rows that this teacher teaches, alone; left out of all teachers:"
    " each row is taught by the mean"
)


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
    teaches: list[str] | None = Field(default=None, min_length=1, description=TEACHES)


class EnsembleSection(Section):
    """Further teachers: the student learns from a weighted mean of the outputs of all.

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

    learn_weights: bool = Field(
        default=False,
        description="find the weights with which the mean predicts the labels of held-out rows best (data.holdout_examples, or"
        " the data's own validation rows), once for the run",
    )
    one_at_a_time: bool = Field(
        default=False,
        description="hold the weights of one teacher in memory at a time: for its turn in each batch they are read from a file"
        " in the run folder. The outputs are the same",
    )
    teaches: list[str] | None = Field(
        default=None, min_length=1, description="the same of teacher.model: names of the rows that it teaches"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "EnsembleSection":
        raise_all(self._by_row_faults() if self.by_row else self._learning_faults() if self.learn_weights else [])
        return self

    def _learning_faults(self) -> list[InputError]:
        given = {"weight": self.weight} | {f"others.{n}.weight": member.weight for n, member in enumerate(self.others)}
        fix = "leave it out: learn_weights finds the weights"
        faults = [InputError(field, weight, fix=fix) for field, weight in given.items() if weight != 1]
        if self.confidence:
            faults.append(
                InputError("confidence", True, fix="leave it out, or leave out learn_weights: choose one of them")
            )
        return faults

    def _by_row_faults(self) -> list[InputError]:
        sections: dict[str, Any] = {"": self}
        sections |= {f"others.{number}.": member for number, member in enumerate(self.others)}
        faults, known = [], dict[str, str]()
        for at, section in sections.items():
            field = f"{at}teaches"
            if section.teaches is None:
                fix = "name the rows that it teaches, as of the other teachers, or leave `teaches` out of all of them"
                faults.append(InputError(field, None, fix=fix))
            for name in section.teaches or ():
                if name in known:
                    faults.append(InputError(field, name, fix=f"leave it out here: {known[name]} has it already"))
                known.setdefault(name, field)
            if section.weight != 1:
                fix = "leave it out: a row is taught by one teacher (`teaches`), not by a mean"
                faults.append(InputError(f"{at}weight", section.weight, fix=fix))
        for field, default in (("average", "probabilities"), ("confidence", False), ("learn_weights", False)):
            if (given := getattr(self, field)) != default:
                fix = "leave it out: a row is taught by one teacher (`teaches`), not by a mean"
                faults.append(InputError(field, given, fix=fix))
        return faults

    @property
    def by_row(self) -> bool:
        """Whether each row is taught by one teacher, which its column `teacher_of` names."""
        return any(teaches is not None for teaches in (self.teaches, *(each.teaches for each in self.others)))

    @property
    def numbers(self) -> dict[str, int]:
        """By name in the column `teacher_of`, the number of the teacher: 0 is `teacher.model`."""
        each = [self.teaches, *(member.teaches for member in self.others)]
        return {name: number for number, names in enumerate(each) for name in names or ()}

    @property
    def weights(self) -> list[float]:
        """Of `teacher.model` and the others, as given."""
        return [self.weight, *(member.weight for member in self.others)]
