"""The section `teacher` of a recipe: the model to learn from, and what stands in for it while a student learns."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from distill_llm.recipe.ensemble import EnsembleSection
from distill_llm.recipe.section import Section
from distill_llm.recipe.sections import training_fields


class TeacherSection(Section):
    """The model to learn from."""

    model: str = Field(min_length=1, description="Hub id, folder, GGUF file, or package://PACKAGE/PATH")
    train: dict[str, Any] | None = Field(
        default=None,
        description="TrainingArguments fields. If given, the teacher is first fine-tuned on the task, with its own head if that"
        " has the task's classes, else with a new one",
    )
    dtype: Literal["float32", "bfloat16"] | None = Field(
        default=None,
        description="dtype of the teacher's weights while a student learns; left out: the student's. This does not change how"
        " the teacher is scored and measured: always in the dtype of its checkpoint",
    )
    quantization: Literal["8bit", "4bit"] | None = Field(
        default=None,
        description="hold the teacher's weights in fewer bits while a student learns (bitsandbytes); pruning, scores and"
        " measurements use the checkpoint itself",
    )
    cache: Path | None = Field(
        default=None,
        description="folder that `distill-llm cache` wrote; the student learns from it, with no teacher in memory",
    )
    ensemble: EnsembleSection | None = Field(
        default=None, description="further models that teach together with this one; left out: it teaches alone"
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run the code that the teacher's folder or repository brings along, if it does; read that code first",
    )

    _check_train = field_validator("train")(training_fields)

    @field_validator("cache")
    @classmethod
    def _expand_home(cls, folder: Path | None) -> Path | None:
        return None if folder is None else Path(os.path.expanduser(folder))
