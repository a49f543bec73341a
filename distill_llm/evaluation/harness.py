"""Benchmarks of lm-evaluation-harness (package lm-eval, extra `harness`) on a decoder, with their standard errors."""

import copy
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, first_line, one_of

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

RESAMPLES = 1000
"""Resamples behind the standard error of a metric that has no formula for it."""


@dataclass(frozen=True)
class Benchmarks:
    """What to run.

    Attributes:
        tasks: names of tasks, groups or tags of the harness.
        limit: most rows of a task; None: all.
        num_fewshot: examples before each question; None: as the task says.
        include_path: folder with tasks of your own as YAML files; None: only those that come with the harness.
        chat: whether questions are put into the tokenizer's chat template.
    """

    tasks: tuple[str, ...]
    limit: int | None = None
    num_fewshot: int | None = None
    include_path: Path | None = None
    chat: bool = False


@dataclass(frozen=True)
class BenchmarkScore:
    """A metric of a task, as the harness reports it.

    Attributes:
        task, metric: its names; the metric has the name of its filter behind it, if there is one.
        score, standard_error: the value; None: the harness knows no error of it.
        higher_is_better: None where the harness does not say.
        rows, shots: rows scored, and examples before each.
    """

    task: str
    metric: str
    score: float
    standard_error: float | None
    higher_is_better: bool | None
    rows: int
    shots: int | None


def check_benchmarks(benchmarks: Benchmarks, field: str = "harness") -> None:
    """Check that the harness is installed, and load its tasks with their data: nothing is left to fail after training.

    Args:
        field: what the tasks are called in error messages.

    Raises:
        InputError: one line.
    """
    if importlib.util.find_spec("lm_eval") is None:
        fix = "install what it needs (lm-eval): pip install 'distill_llm[harness]'"
        raise InputError(field, ", ".join(benchmarks.tasks), fix=fix)
    folder = benchmarks.include_path
    if folder is not None and not folder.is_dir():
        raise InputError(
            "include_path" if field == "harness" else f"{field}.include_path",
            str(folder),
            "a folder with tasks as YAML files",
        )
    manager = _manager(benchmarks.tasks, folder)
    holders: dict[str, str] = {}
    for name in benchmarks.tasks:
        if name not in manager.all_tasks:
            raise InputError(field, name, one_of(manager.all_tasks, name))
        try:
            with _quiet():
                loaded = manager.load([name])["tasks"]
        except Exception as error:  # a task's data come from anywhere, and its YAML file may hold code
            fix = f"make its data reachable, or remove it: it does not load ({first_line(error)})"
            raise InputError(field, name, fix=fix) from error
        if twice := next((task for task in loaded if task in holders), None):  # the harness refuses to run it
            raise InputError(field, name, fix=f"remove it, or {holders[twice]}: both have the task {twice}")
        holders |= dict.fromkeys(loaded, name)
        for task in loaded.values():
            if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
                fix = "remove it: it runs code that the model writes, or shows it images"
                raise InputError(field, name, fix=fix)


def run_benchmarks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, benchmarks: Benchmarks, batch_size: int
) -> list[BenchmarkScore]:
    """Score a decoder with the harness. The model is in eval mode afterwards; random states are as before.

    Args:
        model: on its device, pruned or not.
        tokenizer: the model's; not changed.
        benchmarks: as `check_benchmarks` passed them.
        batch_size: requests at once.

    Returns:
        A score for every metric of every task. Of a group with a score of its own, that alone.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    manager = _manager(benchmarks.tasks, benchmarks.include_path)
    with _quiet(), _own_random_state():
        loaded = manager.load(list(benchmarks.tasks))
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size, backend="causal")
        found = simple_evaluate(
            wrapped,
            tasks=list(benchmarks.tasks),
            task_manager=manager,
            num_fewshot=benchmarks.num_fewshot,
            limit=benchmarks.limit,
            apply_chat_template=benchmarks.chat,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    assert found is not None
    summed = set(found.get("groups", {}))
    inside = {child for group in summed for child in _below(group, found["group_subtasks"])}
    names = [name for name in found["results"] if name in summed | set(loaded["tasks"]) and name not in inside]
    return [score for name in names for score in _scores(name, found)]


def side_by_side(teacher: list[BenchmarkScore], student: list[BenchmarkScore]) -> list[dict[str, Any]]:
    """A row for metrics.json of every score of a teacher and its student."""
    rows = []
    for theirs, own in zip(teacher, student, strict=True):
        row = asdict(own)
        sides = {
            side: {name: asdict(each)[name] for name in ("score", "standard_error")}
            for side, each in (("teacher", theirs), ("student", own))
        }
        rows.append({name: row[name] for name in ("task", "metric", "higher_is_better", "rows", "shots")} | sides)
    return rows


def _below(name: str, children: Mapping[str, list[str]]) -> Iterator[str]:
    for child in children.get(name, []):
        yield child
        yield from _below(child, children)


def _scores(name: str, found: Mapping[str, Any]) -> Iterator[BenchmarkScore]:
    result = found["results"][name]
    for key, value in result.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = result.get(f"{metric}_stderr,{chosen}")
        yield BenchmarkScore(
            name,
            metric if chosen == "none" else f"{metric} ({chosen})",
            float(value),
            float(error) if isinstance(error, int | float) else None,
            (found["higher_is_better"].get(name) or {}).get(metric),
            int(result["sample_len"]),
            found["n-shot"].get(name),
        )


@cache
def _manager(tasks: tuple[str, ...], folder: Path | None) -> "TaskManager":
    """What knows the tasks. The harness's own thousands take some 15 seconds to list, so the user's folder is asked first."""
    from lm_eval.tasks import TaskManager

    with _quiet():
        if folder is not None:
            own = TaskManager(include_path=str(folder), include_defaults=False)
            if set(tasks) <= set(own.all_subtasks):
                return own
        return TaskManager(include_path=None if folder is None else str(folder))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's notices."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The harness sets the seeds of everything; afterwards they are as before."""
    import random

    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
