"""The section `teacher` of a recipe: the model to learn from, and what stands in for it while a student learns."""

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from distill_llm.common.errors import InputError, raise_all
from distill_llm.recipe.changing_teachers import AssistantSection, MovingAverageSection, PeersSection
from distill_llm.recipe.ensemble import EnsembleSection
from distill_llm.recipe.section import Section
from distill_llm.recipe.sections import training_fields
from distill_llm.recipe.server import ServerSection


def _number(start: Any) -> Any:
    """A key as a number where it is one in words, as JSON writes keys."""
    for kind in (int, float):
        try:
            return kind(start) if isinstance(start, str) else start
        except ValueError:
            continue
    return start


def _is_start(start: Any) -> bool:
    """Whether a key is a number of steps or a share of a training."""
    if isinstance(start, float):
        return 0 <= start < 1
    return isinstance(start, int) and not isinstance(start, bool) and start >= 0


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
    moving_average: MovingAverageSection | None = Field(
        default=None,
        description="the student learns from the average of its own weights, in place of this model; it is still cut from and"
        " compared with this model. {} takes the defaults",
    )
    peers: PeersSection | None = Field(
        default=None,
        description="further students of any size that learn together with the student, each from the others, in place of this"
        " model (deep mutual learning); all are saved, in round-1/peer-N/student",
    )
    checkpoints: int | dict[int | float, str] | None = Field(
        default=None,
        description="the teacher at stages of its training: by the student's step (a whole number) or share of its training"
        " (below 1), a folder or Hub id whose weights teach from there on. A number N: the run's own teacher (`train`) at N equal"
        " stages of its training teaches in N equal stages of the student's",
    )
    assistant: AssistantSection | None = Field(
        default=None,
        description="in pruning.rounds, from the second on, the student of the round before teaches with this model; true"
        " takes the defaults",
    )
    server: ServerSection | None = Field(
        default=None, description="a served model that teaches in the place of this one, with the same tokenizer"
    )
    tokenizer: Literal["own"] | None = Field(
        default=None,
        description="own: the student has another tokenizer, and each model reads the text in its own tokens (needs the loss"
        " cross_tokenizer); left out: both have the same",
    )
    trust_remote_code: bool = Field(
        default=False,
        description="run the code that the teacher's folder or repository, or those of its checkpoints, bring along, if they do;"
        " read that code first",
    )

    _check_train = field_validator("train")(training_fields)

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _check_checkpoints(cls, given: Any) -> Any:
        if given is None or (isinstance(given, int) and not isinstance(given, bool) and given >= 2):
            return given
        if not isinstance(given, dict) or not given:
            raise_all([InputError("", given, "a mapping of steps to folders, or a whole number of stages from 2")])
        keys = {_number(start): str(name) for start, name in given.items()}
        wrong = [start for start in keys if not _is_start(start)]
        accepted = "whole numbers of steps, or shares of the training from 0 and below 1, as keys"
        raise_all([InputError("", start, accepted) for start in wrong[:1]])
        return keys

    @field_validator("assistant", mode="before")
    @classmethod
    def _plainly(cls, given: Any) -> Any:
        return {} if given is True else None if given is False else given

    @field_validator("cache")
    @classmethod
    def _expand_home(cls, folder: Path | None) -> Path | None:
        return None if folder is None else Path(os.path.expanduser(folder))

    @property
    def saves_average(self) -> bool:
        """Whether the student that is saved is the average."""
        return self.moving_average is not None and self.moving_average.as_student

    @property
    def is_own(self) -> bool:
        """Whether layers of the student are not compared with those of `model`."""
        return self.moving_average is not None or self.peers is not None
