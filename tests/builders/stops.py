"""Runs that are stopped in training, and gone on with."""

from pathlib import Path
from typing import Any

import pytest
from builders.recipes import write_model
from builders.runs import write_learnable_rows

import distill_llm
from distill_llm.training.trainer import DistillationTrainer

TRAINING = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "use_cpu": True, "save_steps": 2}
LOSSES = {"labels": {}, "logits": {}}
"""Of runs that are stopped: a checkpoint after every second step."""


class Stopped(BaseException):
    """Stands for the end of the process: nothing below main handles it."""


def teacher_and_rows(folder: Path) -> Path:
    """The folder, with a teacher and rows that it can be taught."""
    write_model(folder / "teacher", max_position_embeddings=64)
    write_learnable_rows(folder / "rows.csv")
    return folder


def stopped_and_resumed(recipe: dict[str, Any], folder: Path, monkeypatch: Any, step: int) -> distill_llm.RunResult:
    """Run until so many micro-batches are learnt, and again to the end."""
    left, taken = [step], DistillationTrainer.training_step

    def due(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Stopped
        return taken(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(DistillationTrainer, "training_step", due)
        distill_llm.run(recipe, folder)
    return distill_llm.run(recipe, folder)
