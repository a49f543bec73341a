"""Whole runs on a tiny model: rows that can be learnt, a recipe of two rounds, and what a run leaves."""

from pathlib import Path
from random import Random
from typing import Any

import torch
from builders.recipes import WORDS, recipe_for
from safetensors.torch import load_file


def write_learnable_rows(file: Path, rows: int = 48) -> None:
    """Rows of uneven length that can be learnt: a film with "good" in it is liked."""
    random = Random(0)
    lines = ["review,mood"]
    for _ in range(rows):
        text = random.choices(WORDS[5:], k=random.randint(2, 12))
        lines.append(f"{' '.join(text)},{'pos' if 'good' in text else 'neg'}")
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def two_rounds(folder: Path, **changes: Any) -> dict[str, Any]:
    """Two rounds on a teacher that is trained first, a few steps each, with dropout, accumulation and length grouping."""
    training = {
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "group_by_length",
        "save_steps": 2,
    }
    losses = {
        "labels": {"weight": 0.5},
        "logits": {"weight": 0.5, "temperature": 2.0},
        "hidden": {"weight": 1.0},
        "attention": {"weight": 1.0},
    }
    return recipe_for(
        folder,
        **{
            "teacher": {"model": str(folder / "teacher"), "train": training},
            "pruning": {"keep": 0.5, "rounds": 2, "calibration_examples": 8},
            "distillation": {"losses": losses, **training},
            **changes,
        },
    )


def rows_of(inputs: Path) -> dict[str, Any]:
    """The data section for the rows of `inputs`."""
    columns = {"text": "review", "label": "mood"}
    return {"task": "classification", "path": str(inputs / "rows.csv"), "columns": columns, "max_length": 16}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """What a saved model holds."""
    return load_file(folder / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether all weights are bit-equal and of the same dtypes."""
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
