"""The rows on which two models differ most."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.data.padding import LENGTH, Collator
from distill_llm.data.tasks import Task
from distill_llm.evaluation.evaluate import BATCH_LOSSES, batches_of, by_length
from distill_llm.models.inputs import forward_inputs

MOST_ROWS, MOST_TOKENS, FEWEST_ROWS = 2000, 50_000, 32
"""Rows that are looked at: at most so many, and of long ones fewer, but not fewer than the last."""


@dataclass(frozen=True)
class Answer:
    """What a model says of a row, to show.

    Attributes:
        says: the class, the number, or the loss.
        share: the probability of the class; None without classes.
    """

    says: str
    share: float | None = None


@dataclass(frozen=True)
class Disagreement:
    """A row with the answers of both models.

    Attributes:
        row: its number in the data.
        distance: between the answers. Classes: the share of the probability that is on other classes (total variation), a mean
            over the row's items; regression: of the two values; language models: of the mean losses of the row's tokens, in nats.
        truth: what the data say; None for language models.
        teacher, student: what the models say.
    """

    row: int
    distance: float
    truth: str | None
    teacher: Answer
    student: Answer


@dataclass(frozen=True)
class Disagreements:
    """What was found.

    Attributes:
        rows: how many were looked at, spread evenly over the data.
        agreement: the share of the items of these rows to which both models give the same class; None without classes.
        examples: the rows with the largest distances, the largest first.
    """

    rows: int
    agreement: float | None
    examples: list[Disagreement] = field(default_factory=list)


@dataclass(frozen=True)
class _Read:
    """One model's outputs for a row: items (n, C) and labels (n,), or the mean loss of its tokens."""

    outputs: np.ndarray
    labels: np.ndarray


def find_disagreements(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    dataset: Dataset,
    task: Task,
    collator: Collator,
    *,
    count: int,
    batch_size: int = 64,
) -> Disagreements:
    """The `count` rows on which a student is farthest from its teacher.

    Args:
        teacher, student: with the task's head; their training modes are restored.
        dataset: encoded rows, at least one; of many, some are looked at.
        task: says what the outputs mean.
        collator: from `distill_llm.data.collator`.
        count: how many to return, those without any distance left out.
        batch_size: rows per forward pass.
    """
    chosen = _spread(dataset)
    rows = dataset.select(chosen)
    theirs, ours = (_read(model, rows, task, collator, batch_size) for model in (teacher, student))
    distances = [_distance(a, b, task) for a, b in zip(theirs, ours, strict=True)]
    order = sorted((place for place, far in enumerate(distances) if far > 0), key=lambda place: -distances[place])
    found = [
        Disagreement(
            chosen[place],
            distances[place],
            _truth(theirs[place], task),
            _answer(theirs[place], task),
            _answer(ours[place], task),
        )
        for place in order[:count]
    ]
    return Disagreements(len(rows), _agreement(theirs, ours, task), found)


def _spread(dataset: Dataset) -> list[int]:
    """Row numbers, ascending."""
    mean = max(1.0, float(np.mean(dataset[LENGTH])))
    size = min(len(dataset), MOST_ROWS, max(FEWEST_ROWS, int(MOST_TOKENS / mean)))
    return [int(place) for place in np.linspace(0, len(dataset) - 1, size).round()]


def _read(model: PreTrainedModel, rows: Dataset, task: Task, collator: Collator, batch_size: int) -> list[_Read]:
    """What a model says of every row, in the order of the rows."""
    order, found = by_length(rows), []
    for batch in batches_of(model, rows, order, collator, batch_size, progress=False):
        with torch.inference_mode():
            if task.is_language_model:
                sums, counts = BATCH_LOSSES[task.kind.item](model, batch)
                means = (sums.double() / counts.clamp(min=1)).numpy()
                found += [_Read(mean.reshape(1, 1), np.zeros(1)) for mean in means]
                continue
            labels = batch.pop("labels").cpu().numpy()
            outputs = task.kind.outputs(model(**forward_inputs(model, batch))).float().cpu().numpy()
        for row in range(len(labels)):
            found.append(_Read(*task.kind.items(outputs[row : row + 1], labels[row : row + 1])))
    return [found[place] for place in np.argsort(order)]


def _has_classes(task: Task) -> bool:
    return task.kind.has_distribution and not task.is_language_model


def _shares(read: _Read) -> np.ndarray:
    """(n, C) probabilities."""
    return torch.from_numpy(read.outputs).softmax(-1).numpy()


def _distance(teacher: _Read, student: _Read, task: Task) -> float:
    if not len(teacher.outputs):
        return 0.0
    if _has_classes(task):
        return float(np.abs(_shares(teacher) - _shares(student)).sum(-1).mean() / 2)
    return float(np.abs(teacher.outputs - student.outputs).mean())


def _agreement(teacher: Sequence[_Read], student: Sequence[_Read], task: Task) -> float | None:
    if not _has_classes(task):
        return None
    same = [a.outputs.argmax(-1) == b.outputs.argmax(-1) for a, b in zip(teacher, student, strict=True)]
    return float(np.concatenate(same).mean()) if sum(map(len, same)) else None


def _answer(read: _Read, task: Task) -> Answer:
    if not _has_classes(task):
        value = f"{read.outputs.mean():.4g}"
        return Answer(f"loss {value}" if task.is_language_model else value)
    if task.kind.item == "example":
        shares = _shares(read)[0]
        return Answer(_name(int(shares.argmax()), task), float(shares.max()))
    right = int((read.outputs.argmax(-1) == read.labels).sum())
    return Answer(f"{right} of {len(read.labels)} items right")


def _truth(read: _Read, task: Task) -> str | None:
    if task.is_language_model or task.kind.item != "example":
        return None
    label: Any = read.labels.reshape(-1)[0]
    return _name(int(label), task) if _has_classes(task) else f"{float(label):.4g}"


def _name(label: int, task: Task) -> str:
    names = task.label_names or ()
    return names[label] if 0 <= label < len(names) else str(label)
