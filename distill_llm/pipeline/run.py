"""The loop: teacher -> (statistics -> plan -> prune -> compensate -> recover) x rounds -> student and report."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from distill_llm.checks.prune import open_pruning
from distill_llm.checks.recipe import Opened, check_cached_rows, open_recipe
from distill_llm.common.files import written_whole
from distill_llm.pipeline.folder import PUSH, REPORT, RunFolder
from distill_llm.pipeline.stages import Stages
from distill_llm.recipe.recipe import Recipe, parse_recipe


@dataclass(frozen=True)
class RunResult:
    """What a run made: the contents of metrics.json, and where student and report are."""

    metrics: dict[str, Any]
    student_dir: Path
    report: Path


def run(recipe: Recipe | Mapping[str, Any], output_dir: str | Path | None = None) -> RunResult:
    """Carry out a recipe; called again after a stop, go on where it stopped and end with the same weights.

    Args:
        recipe: a `Recipe`, or its plain mapping.
        output_dir: the run folder; the recipe's own where left out.

    Raises:
        InputError: for anything wrong in the recipe, before any work.
    """
    recipe = recipe if isinstance(recipe, Recipe) else parse_recipe(dict(recipe))
    if output_dir is not None:
        recipe = recipe.model_copy(update={"output_dir": Path(output_dir).expanduser()})
    return Run(open_recipe(recipe)).result()


def prune_recipe(recipe: Recipe) -> Path:
    """Importance, plan, prune, compensate, save; no training.

    Args:
        recipe: a teacher fine-tuned on the task, its data, how to prune it, and how to score and time both.

    Returns:
        The folder of the pruned model, in the dtype of the teacher's checkpoint, with tokenizer and plan.json.

    Raises:
        InputError: for anything wrong in the recipe, also what pruning alone would leave undone, before any work.
    """
    target, section, stages = recipe.output_dir, recipe.pruning, Stages(open_pruning(recipe))
    assert section is not None and section.keep is not None
    file = section.statistics.expanduser() if section.statistics is not None else None
    where = torch.device("cpu") if section.offload else stages.processes.device
    teacher = stages.load(stages.teacher_path, device=where).eval()
    cut = stages.cutter(section).cut(teacher, teacher, section.keep, file)
    if not stages.processes.is_main_process:
        return target
    plan, student = cut.plan, stages.as_written(cut.model)
    del cut  # two models at a time
    with written_whole(target, folder=True) as folder:
        stages.save(student, folder)
        stages.show(plan, teacher, folder, "plan")
    teacher = stages.as_written(teacher)
    scores = [stages.evaluate(model)["score"] for model in (teacher, student)]
    of = "the latency" if section.cost == "latency" else f"the layers' {section.cost}"
    share = f"{plan.kept:.1%} of {of} kept" + (f" ({plan.note})" if plan.note else "")
    _say(stages, f"prune: {share}, {stages.data.task.main_metric} {scores[0]:.4f} -> {scores[1]:.4f}")
    return target


class Run:
    """The stages of a recipe in order, those that are done read from the run folder.

    Args:
        opened: of the recipe.
    """

    def __init__(self, opened: Opened):
        self.recipe, self.stages = recipe, stages = opened.recipe, Stages(opened)
        train = stages.data.train  # on all processes at once: reading it waits for process 0
        check_cached_rows(opened, train)
        self.state = RunFolder(Path(recipe.output_dir), recipe.to_yaml())

    def result(self) -> RunResult:
        """All stages, then the report."""
        recipe, stages, state = self.recipe, self.stages, self.state
        teacher = state.stage("teacher", stages.teacher, everyone=True)
        self._line("teacher", teacher)
        stages.clean(stages.folder / "teacher")
        teacher_dir = stages.folder / "teacher" if recipe.teacher.train is not None else Path(stages.teacher_path)
        student_dir = teacher_dir
        rounds = []
        count = recipe.pruning.rounds if recipe.pruning else 1
        for number in range(1, count + 1):
            row: dict[str, Any] = {"round": number, "seconds": {}}
            folder = stages.folder / f"round-{number}"
            if recipe.pruning is not None:
                name = f"round-{number}/prune"
                pruned = state.stage(
                    name,
                    lambda: stages.prune(folder, student_dir, teacher_dir, number),  # noqa: B023
                    everyone=True,
                )
                self._line(name, pruned)
                row |= {k: v for k, v in pruned.items() if k != "seconds"}
                row["seconds"]["prune"] = pruned["seconds"]
                student_dir = folder / "pruned"
            if recipe.distillation is not None:
                name = f"round-{number}/recover"
                last = number == count
                recovered = state.stage(
                    name,
                    lambda: stages.recover(folder, student_dir, teacher_dir, last),  # noqa: B023
                    everyone=True,
                )
                self._line(name, recovered)
                stages.clean(folder / "student")
                row |= {"score_recovered": recovered["score"], "recovered": recovered["metrics"]}
                row["seconds"]["recover"] = recovered["seconds"]
                student_dir = folder / "student"
            rounds.append(row)
        finished = state.stage(REPORT, lambda: stages.report(teacher_dir, student_dir, teacher, rounds, state.seconds))
        metrics = json.loads((stages.folder / "metrics.json").read_text())
        self._line(REPORT, finished)
        if recipe.hub is not None:
            state.stage(PUSH + recipe.hub.repo_id, stages.push)
        return RunResult(metrics, stages.folder / "student", stages.folder / "report.md")

    def _line(self, stage: str, result: Mapping[str, Any]) -> None:
        metric = self.stages.data.task.main_metric if "score" in result else ""
        parts = [f"{metric} {result['score']:.4f}"] if "score" in result else []
        if "score_pruned" in result:
            parts.append(f"{result['layer_params_kept']:.1%} of the layers' parameters kept")
            parts.append(f"{self.stages.data.task.main_metric} {result['score_pruned']:.4f} pruned")
            if result["score_compensated"] is not None:
                parts.append(f"{result['score_compensated']:.4f} compensated")
        if "summary" in result:
            parts.append(result["summary"])
        if result.get("note"):
            parts.append(result["note"])
        _say(self.stages, f"{stage}: {', '.join(parts)} ({result['seconds']:.0f} s)")


def _say(stages: Stages, text: str) -> None:
    """A line to the user, from process 0."""
    if stages.processes.is_main_process:
        Console(soft_wrap=True).print(text, markup=False, highlight=False)
