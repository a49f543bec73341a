"""The section `quantize`: the finished student in fewer bits."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_llm.common.errors import InputError, raise_all
from distill_llm.quantizing.scheme import Scheme
from distill_llm.recipe.section import Section
from distill_llm.recipe.sections import DistillationSection, ExportSection, StudentSection, training_fields
from distill_llm.recipe.teacher import TeacherSection


class QuantizeSection(Section):
    """The weights of the student's layers in fewer bits, after the last round, by torchao (extra `quantize`)."""

    bits: Literal[8, 4] = Field(
        description="bits of a weight; torchao stores 4 bits in a byte, so that on a CPU they take the room of 8"
    )
    activations: bool = Field(
        default=False,
        description="round the inputs of linear layers too, to 8 bits, with a scale for each token that is found while the"
        " model runs. With bits 8, symmetric, and no group_size, whole numbers are multiplied; otherwise this imitates it",
    )
    symmetric: bool = Field(
        default=True,
        description="let 0 stand for 0; false: use the range from the least to the largest weight, with a zero point",
    )
    group_size: int | None = Field(
        default=None,
        ge=2,
        description="number of neighbouring weights of a row that share a scale; left out: the whole row",
    )
    smooth: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="move the range of activations into the weights before rounding (SmoothQuant, alpha; 0.5 is usual),"
        " calibrated on training rows; for bits 8 with activations",
    )
    calibration_examples: int = Field(
        default=128, ge=1, description="number of training rows that `smooth` is calibrated on"
    )
    train: dict[str, Any] | None = Field(
        default=None,
        description="TrainingArguments fields that differ from those of the last recovery. If given, the student first learns"
        " from the teacher as if it were rounded already, with the losses of `distillation`; {} takes the same fields",
    )

    _check_train = field_validator("train")(training_fields)

    @property
    def scheme(self) -> Scheme:
        """How it is rounded."""
        return Scheme(self.bits, self.activations, self.symmetric, self.group_size, self.smooth)

    @model_validator(mode="after")
    def _consistent(self) -> "QuantizeSection":
        faults = self.scheme.faults()
        if self.train is not None:
            faults += self.scheme.learning_faults("train")
        raise_all(faults)
        return self


def quantize_faults(
    section: QuantizeSection,
    teacher: TeacherSection,
    student: StudentSection | None,
    distillation: DistillationSection | None,
    export: Sequence[ExportSection],
) -> list[InputError]:
    """What of a recipe's other sections does not go with this one."""
    faults = []
    if section.train is not None and distillation is None:
        fix = "add a distillation section, whose losses it learns with, or remove it"
        faults.append(InputError("quantize.train", section.train, fix=fix))
    if section.train is not None and student is not None and student.peft is not None:
        fix = "remove it, or student.peft: all weights learn under rounding, not adapters alone"
        faults.append(InputError("quantize.train", section.train, fix=fix))
    for name in ("peers", "moving_average", "checkpoints"):
        if section.train is not None and getattr(teacher, name) is not None:
            fix = f"remove it, or teacher.{name}: a student learns under rounding from the teacher itself"
            faults.append(InputError("quantize.train", section.train, fix=fix))
    if export:
        fix = "remove it, or the quantize section: an export is rounded by its own `quantize`, from the full precision"
        faults.append(InputError("export", ", ".join(each.format for each in export), fix=fix))
    return faults
