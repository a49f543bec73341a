"""A teacher in the course of a training: told of every step, saved in checkpoints, read from them again."""

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from distill_llm.common.errors import InputError
from distill_llm.teachers.base import Teacher

TEACHER_NAME = "teacher.pt"


class StepsDone(TrainerCallback):
    """Tells a teacher of the beginning of a training, and of every optimizer step."""

    def __init__(self, teacher: Teacher):
        self.teacher = teacher

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first step, once the checkpoint of a resumed training is read."""
        self.teacher.begin(state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step, before the log, evaluation and checkpoint of this step."""
        self.teacher.after_step(state.global_step)


def save(teacher: Teacher, folder: str) -> None:
    """Write the state of a teacher that has one."""
    if state := teacher.state_dict():
        torch.save(state, Path(folder) / TEACHER_NAME)


def load(teacher: Teacher, folder: str) -> None:
    """Give a teacher the state that `save` wrote.

    Raises:
        InputError: the teacher has a state, and the checkpoint none; or the other way round.
    """
    path = Path(folder) / TEACHER_NAME
    if path.is_file():
        if type(teacher).load_state_dict is Teacher.load_state_dict:
            fix = f"resume with the teacher of that training: {teacher.gives.name} does not read its {TEACHER_NAME}"
            raise InputError("resume_from_checkpoint", str(folder), fix=fix)
        teacher.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    elif teacher.state_dict():
        fix = f"resume from a checkpoint of a training with this teacher: {TEACHER_NAME} is missing"
        raise InputError("resume_from_checkpoint", str(folder), fix=fix)
