"""The loop: teacher -> (statistics -> plan -> prune -> compensate -> recover) x rounds -> student and report."""

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from distill_llm.checkpoint import load_for_task, load_pretrained
from distill_llm.checks import check_data, check_recipe
from distill_llm.data.encoding import LENGTH, Collator, collator, encode
from distill_llm.data.sources import resolve_path
from distill_llm.data.tasks import TaskData
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.pruning.criteria import score
from distill_llm.pruning.plan import PruningPlan, keep_layers, plan_pruning
from distill_llm.pruning.statistics import Statistics, collect_statistics
from distill_llm.pruning.structure import layer_shapes, unit_costs
from distill_llm.pruning.surgery import prune
from distill_llm.recipe import PruningSection, Recipe, parse_recipe
from distill_llm.result import collect_metrics
from distill_llm.run_folder import MarkComplete, RunFolder, last_complete_checkpoint, written_whole
from distill_llm.trainer import DistillationConfig, DistillationTrainer

CALIBRATION_BATCH = 32
NO_GRADIENT = ("random", "magnitude", "activation", "block_influence")

TRAINING_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "steps",
    "save_steps": 0.25,  # a share of the steps: four checkpoints to resume from
    "save_total_limit": 2,
    "logging_steps": 0.05,
    "eval_strategy": "no",
}


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
        recipe = recipe.model_copy(update={"output_dir": Path(output_dir)})
    check_recipe(recipe)
    return Run(recipe).result()


def prune_model(
    model: str,
    task: str,
    keep: float,
    output_dir: str | Path,
    *,
    data: str | None = None,
    max_length: int = 128,
    **options: Any,
) -> Path:
    """Importance, plan, prune, compensate, save; no training.

    Args:
        model: folder, Hub id or package:// path of a model fine-tuned on the task.
        keep: share of the layers' cost that remains.
        data: where the task's rows are; a GLUE task's default is the Hub.
        max_length: tokens an example is cut to.
        options: fields of the recipe's pruning section.

    Returns:
        The folder of the pruned model, with tokenizer and plan.json.
    """
    given = {
        "teacher": {"model": model},
        "data": {"task": task, "path": data, "max_length": max_length},
        "pruning": {**options, "keep": keep},
        "output_dir": str(output_dir),
    }
    recipe = parse_recipe(given)
    check_recipe(recipe)
    assert recipe.pruning is not None
    loop = Run(recipe, keep_state=False)
    teacher = loop.load(resolve_path(model)).eval()
    plan, statistics = loop.plan(teacher, teacher, recipe.pruning, keep)
    student = prune(teacher, plan, statistics if recipe.pruning.compensate else None)
    target = Path(output_dir)
    with written_whole(target) as folder:
        loop.save(student, folder)
        plan.save(folder / "plan.json")
    scores = [loop.evaluate(m)["score"] for m in (teacher, student)]
    share = f"{plan.kept:.1%} of the layers' {recipe.pruning.cost} kept"
    loop.say(f"prune: {share}, {loop.data.task.main_metric} {scores[0]:.4f} -> {scores[1]:.4f}")
    return target


class Run:
    """One run of a recipe: its data, its device, and its stages in order.

    Args:
        recipe: checked already.
        keep_state: whether to keep the run's state in its folder.
    """

    def __init__(self, recipe: Recipe, keep_state: bool = True):
        self.recipe, self.folder = recipe, Path(recipe.output_dir)
        self.processes = PartialState()
        self.console = Console(soft_wrap=True)
        self.state = RunFolder(self.folder, recipe.to_yaml()) if keep_state else None
        self.teacher_path = resolve_path(recipe.teacher.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's, which is the student's too."""
        return AutoTokenizer.from_pretrained(self.teacher_path)

    @cached_property
    def data(self) -> TaskData:
        """Encoded rows; process 0 tokenizes, the others read its cache."""
        with self.processes.main_process_first():
            return encode(check_data(self.recipe), self.tokenizer, self.recipe.data.max_length)

    @cached_property
    def collator(self) -> Collator:
        """Pads batches of this task."""
        return collator(self.data.task, self.tokenizer, self.recipe.seed)

    def say(self, text: str) -> None:
        """A line to the user, from process 0."""
        if self.processes.is_main_process:
            self.console.print(text, markup=False, highlight=False)

    def load(self, path: str | Path) -> PreTrainedModel:
        """A finished model of this run, on this process's device."""
        return load_pretrained(path).to(self.processes.device)  # type: ignore[arg-type]

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        """Model and tokenizer."""
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Metrics on the reported split; with held-out rows also `validation`, the score on those, for choices."""
        size = self.recipe.evaluation.batch_size
        metrics = evaluate_model(model, self.data.test, self.data.task, self.collator, batch_size=size)
        if self.data.validation is not None:
            held_out = evaluate_model(model, self.data.validation, self.data.task, self.collator, batch_size=size)
            metrics["validation"] = held_out["score"]
        return metrics

    def result(self) -> RunResult:
        """All stages, then the report."""
        assert self.state is not None
        start = time.monotonic()
        teacher = self.state.stage("teacher", self._teacher, everyone=True)
        self._line("teacher", teacher)
        teacher_dir = self.folder / "teacher" if self.recipe.teacher.train is not None else Path(self.teacher_path)
        student_dir = teacher_dir
        rounds = []
        count = self.recipe.pruning.rounds if self.recipe.pruning else 1
        for number in range(1, count + 1):
            row: dict[str, Any] = {"round": number, "seconds": {}}
            folder = self.folder / f"round-{number}"
            if self.recipe.pruning is not None:
                name = f"round-{number}/prune"
                pruned = self.state.stage(name, lambda: self._prune(folder, student_dir, teacher_dir, number))  # noqa: B023
                self._line(name, pruned)
                row |= {k: v for k, v in pruned.items() if k != "seconds"}
                row["seconds"]["prune"] = pruned["seconds"]
                student_dir = folder / "pruned"
            if self.recipe.distillation is not None:
                name = f"round-{number}/recover"
                last = number == count
                recovered = self.state.stage(
                    name,
                    lambda: self._recover(folder, student_dir, teacher_dir, last),  # noqa: B023
                    everyone=True,
                )
                self._line(name, recovered)
                row |= {"score_recovered": recovered["score"], "recovered": recovered["metrics"]}
                row["seconds"]["recover"] = recovered["seconds"]
                student_dir = folder / "student"
            rounds.append(row)
        seconds = {"seconds_here": round(time.monotonic() - start, 2)}
        finished = self.state.stage("report", lambda: self._report(teacher_dir, student_dir, teacher, rounds) | seconds)
        metrics = json.loads((self.folder / "metrics.json").read_text())
        self._line("report", finished)
        if self.recipe.hub is not None:
            self.state.stage("push", self._push)
        return RunResult(metrics, self.folder / "student", self.folder / "report.md")

    def _line(self, stage: str, result: Mapping[str, Any]) -> None:
        metric = self.data.task.main_metric if "score" in result else ""
        parts = [f"{metric} {result['score']:.4f}"] if "score" in result else []
        if "score_pruned" in result:
            parts.append(f"{result['layer_params_kept']:.1%} of the layers' parameters kept")
            parts.append(f"{self.data.task.main_metric} {result['score_pruned']:.4f} pruned")
            if result["score_compensated"] is not None:
                parts.append(f"{result['score_compensated']:.4f} compensated")
        if "summary" in result:
            parts.append(result["summary"])
        self.say(f"{stage}: {', '.join(parts)} ({result['seconds']:.0f} s)")

    # The stages. Each leaves its files whole in the run folder and returns what state.json keeps.

    def _teacher(self) -> dict[str, Any]:
        section = self.recipe.teacher
        if section.train is None:
            model = self.load(self.teacher_path)
        else:
            set_seed(self.recipe.seed)
            model = load_for_task(self.teacher_path, self.data.task)
            model = self._train(model, None, self.folder / "teacher", "teacher", {"labels": {}})
        metrics = self.evaluate(model) if self.processes.is_main_process else {"score": 0.0}
        return {"score": metrics["score"], "metrics": metrics}

    def _prune(self, folder: Path, student_dir: Path, teacher_dir: Path, number: int) -> dict[str, Any]:
        section = self.recipe.pruning
        assert section is not None
        student, teacher = self.load(student_dir).eval(), self.load(teacher_dir)
        if section.layers is not None:
            plan, statistics = keep_layers(student, section.layers), None
        else:
            assert section.keep is not None
            keep = kept_after(section.keep, number, section.rounds, section.schedule)
            plan, statistics = self.plan(student, teacher, section, keep)
        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder / "plan.json")
        if statistics is not None:
            with written_whole(folder / "statistics.safetensors") as path:
                statistics.save(path)
        result = prune(student, plan)
        pruned, compensated = self.evaluate(result), None
        if section.compensate and statistics is not None:
            result = prune(student, plan, statistics)
            compensated = self.evaluate(result)
        with written_whole(folder / "pruned") as path:
            self.save(result, path)
        return {
            "keep": share_of(result, teacher, section.cost, self.recipe.evaluation.latency.sequence_length),
            "layer_params_kept": share_of(result, teacher, "params"),
            "note": plan.note,
            "score_pruned": pruned["score"],
            "score_compensated": compensated["score"] if compensated else None,
            "pruned": pruned,
            "compensated": compensated,
        }

    def plan(
        self, student: PreTrainedModel, teacher: PreTrainedModel, section: PruningSection, keep: float
    ) -> tuple[PruningPlan, Statistics]:
        """Statistics of the student on calibration rows, and the plan that leaves `keep` of the teacher's layers' cost."""
        gradients = section.criterion not in NO_GRADIENT
        statistics = collect_statistics(
            student,
            self.calibration(section.calibration_examples),
            "labels" if gradients else None,
            moments=section.compensate,
        )
        length = self.recipe.evaluation.latency.sequence_length
        plan = plan_pruning(
            student,
            score(statistics, section.criterion, self.recipe.seed),
            min(1.0, keep / share_of(student, teacher, section.cost, length)),
            cost=section.cost,
            units=section.units,
            scope=section.scope,
            round_to=section.round_to,
            uniform=section.uniform,
            sequence_length=length,
        )
        if plan.note:
            self.say(plan.note)
        return plan, statistics

    def calibration(self, examples: int) -> DataLoader:
        """Batches of like length of the first rows of the shuffled training data."""
        train = self.data.train.shuffle(seed=self.recipe.seed)
        rows = train.select(range(min(examples, len(train))))
        rows = rows.select(np.argsort(rows[LENGTH], kind="stable"))
        known = {*self.tokenizer.model_input_names, "labels"}
        rows = rows.remove_columns([name for name in rows.column_names if name not in known])
        return DataLoader(rows, batch_size=CALIBRATION_BATCH, collate_fn=self.collator)  # type: ignore[arg-type]

    def _recover(self, folder: Path, student_dir: Path, teacher_dir: Path, last: bool) -> dict[str, Any]:
        section = self.recipe.distillation
        assert section is not None
        if self.recipe.pruning is None:
            assert self.recipe.student is not None
            set_seed(self.recipe.seed)
            student = load_for_task(resolve_path(self.recipe.student.model), self.data.task)
        else:
            student = load_pretrained(student_dir)
        losses = section.losses.model_dump(mode="json", exclude_none=True)
        teacher = load_pretrained(teacher_dir, dtype=getattr(torch, self.recipe.teacher.dtype))
        student = self._train(student, teacher, folder / "student", "final" if last else "recovery", losses)
        metrics = self.evaluate(student) if self.processes.is_main_process else {"score": 0.0}
        return {"score": metrics["score"], "metrics": metrics}

    def _train(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, target: Path, stage: str, losses: dict[str, Any]
    ) -> PreTrainedModel:
        """Train from the last whole checkpoint of this stage, save to `target`, and remove the checkpoints."""
        work = target.with_name(target.name + "-training")
        fields = {"use_cpu": not torch.accelerator.is_available(), **TRAINING_DEFAULTS, **self.recipe.training(stage)}  # type: ignore[arg-type]
        args = DistillationConfig(output_dir=str(work), losses=losses, **fields)
        trainer = DistillationTrainer(
            model=model,
            teacher=teacher,
            args=args,
            train_dataset=self.data.train,
            eval_dataset=self.data.validation,
            data_collator=self.collator,
            processing_class=self.tokenizer,
            callbacks=[MarkComplete()],
        )
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(work))
        if self.processes.is_main_process:
            with written_whole(target) as path:
                self.save(trainer.accelerator.unwrap_model(trainer.model), path)
            shutil.rmtree(work, ignore_errors=True)
        self.processes.wait_for_everyone()
        return self.load(target)

    def _report(
        self, teacher_dir: Path, student_dir: Path, teacher: Mapping[str, Any], rounds: list[dict[str, Any]]
    ) -> dict[str, Any]:
        from distill_llm.report import write_card, write_report  # matplotlib is slow to import
        from distill_llm.report.tables import percent

        with written_whole(self.folder / "student") as path:
            shutil.copytree(student_dir, path, ignore=shutil.ignore_patterns("training_args.bin"))
        assert self.state is not None
        metrics = collect_metrics(
            self.recipe,
            self.data.task,
            self.load(teacher_dir),
            self.load(student_dir),
            teacher,
            rounds,
            seconds=sum(result["seconds"] for result in self.state.results.values()),
        )
        with written_whole(self.folder / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n")
        write_report(self.folder, metrics)
        write_card(self.folder / "student", metrics, self.recipe.to_yaml())
        kept = f"{percent(metrics['layer_params_kept'])} of the layers' parameters"
        speed = f"speed-up {metrics['speedup']:.2f}x on {metrics['device']}"
        return {"summary": f"retention {percent(metrics['retention'])}, {kept}, {speed}"}

    def _push(self) -> dict[str, Any]:
        from distill_llm.hub import push

        assert self.recipe.hub is not None
        return {"url": push(self.folder / "student", self.recipe.hub.repo_id, private=self.recipe.hub.private)}


def kept_after(keep: float, number: int, rounds: int, schedule: str) -> float:
    """The share of the teacher's layers that stays after round `number` of `rounds`.

    "linear" removes the same share in every round; "cubic" removes most in the first ones (Zhu and Gupta 2017, equation 1).
    """
    left = 1 - number / rounds
    return keep + (1 - keep) * (left if schedule == "linear" else left**3)


def share_of(student: PreTrainedModel, teacher: PreTrainedModel, cost: str, sequence_length: int = 128) -> float:
    """The share of the teacher's layers' cost that the student's layers have."""
    costs = unit_costs(teacher, cost, sequence_length)
    return costs.of(layer_shapes(student)) / costs.of(layer_shapes(teacher))
