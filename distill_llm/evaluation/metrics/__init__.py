"""Metric modules of `evaluate`, one a file, loaded by path: nothing is fetched."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill_llm.data.tasks import Task
from distill_llm.errors import InputError, one_of

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = ("accuracy", "f1", "matthews_correlation", "pearsonr", "spearmanr", "exact_match", "final_answer")


@cache
def load_metric(name: str) -> "EvaluationModule":
    """One of `METRICS` as an `evaluate` module; its `compute(predictions=..., references=...)` works in memory.

    Raises:
        InputError: no such metric.
    """
    import evaluate

    if name not in METRICS:
        raise InputError("metric", name, one_of(METRICS, name))
    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), keep_in_memory=True)


def compute_metrics(task: Task, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """All metrics of a task, under the names of their modules, and the main one again as `score`.

    Args:
        task: one with metrics; F1 is that of class 1 for two classes, else the mean over classes.
        predictions: (rows,) class ids, values or texts.
        references: (rows,) of the same kind.
    """
    result: dict[str, float] = {}
    for name in task.metrics:
        options = {"average": "macro"} if name == "f1" and task.num_labels > 2 else {}
        result |= load_metric(name).compute(predictions=predictions, references=references, **options)
    return {**result, "score": result[task.main_metric]}
