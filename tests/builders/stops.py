"""Runs that are stopped in training, and gone on with."""

from pathlib import Path
from typing import Any

import pytest

import distill_llm
from distill_llm.training.trainer import DistillationTrainer


class Stopped(BaseException):
    """Stands for the end of the process: nothing below main handles it."""


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
