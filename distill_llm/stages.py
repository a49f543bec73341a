"""The stages of a run: each leaves its files whole in the run folder and returns what state.json keeps."""

import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoTokenizer, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from distill_llm.checkpoint import load_for_task, load_pretrained
from distill_llm.checks import check_data
from distill_llm.data.encoding import LENGTH, Collator, collator, encode
from distill_llm.data.sources import resolve_path
from distill_llm.data.tasks import TaskData
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.evaluation.metrics import compute_metrics
from distill_llm.pruning.criteria import score
from distill_llm.pruning.plan import PruningPlan, keep_layers
from distill_llm.pruning.planning import plan_pruning
from distill_llm.pruning.collecting import collect_statistics
from distill_llm.pruning.statistics import Statistics
from distill_llm.pruning.structure import layer_shapes, unit_costs
from distill_llm.pruning.surgery import prune
from distill_llm.recipe import PruningSection, Recipe
from distill_llm.result import collect_metrics
from distill_llm.run_folder import MarkComplete, last_complete_checkpoint, written_whole
from distill_llm.trainer import DistillationConfig, DistillationTrainer

CALIBRATION_BATCH = 32
NO_GRADIENT = ("random", "magnitude", "activation", "block_influence")


class Stages:
    """The data and device of a run, and the work of its stages.

    Args:
        recipe: checked already.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, Path(recipe.output_dir)
        self.processes = PartialState()
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

    def load(self, path: str | Path) -> PreTrainedModel:
        """A finished model of this run, in fp32, on this process's device."""
        return load_pretrained(path, dtype=torch.float32).to(self.processes.device)  # type: ignore[arg-type]

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

    def teacher(self) -> dict[str, Any]:
        """Fine-tune the teacher, where the recipe says so, and score it."""
        section = self.recipe.teacher
        if section.train is None:
            model = self.load(self.teacher_path)
        else:
            set_seed(self.recipe.seed)
            model = load_for_task(self.teacher_path, self.data.task)
            model = self._train(model, None, self.folder / "teacher", "teacher", {"labels": {}})
        metrics = self.evaluate(model) if self.processes.is_main_process else {"score": 0.0}
        return {"score": metrics["score"], "metrics": metrics}

    def prune(self, folder: Path, student_dir: Path, teacher_dir: Path, number: int) -> dict[str, Any]:
        """Statistics, plan, pruned and compensated model, both scored."""
        section = self.recipe.pruning
        assert section is not None
        student, teacher = self.load(student_dir).eval(), self.load(teacher_dir)
        length = self.recipe.evaluation.latency.sequence_length
        if section.layers is not None:
            plan, statistics = keep_layers(student, section.layers), None
            keep = plan.share(student, section.cost, length)
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
        kept, note = share_of(result, teacher, section.cost, length), None
        if abs(kept - keep) > 0.01 * keep:
            note = f"round {number} kept {kept:.2%} of the layers' {section.cost} where {keep:.2%} was asked for: "
            note += "what may be removed comes in larger steps"
        return {
            "keep": keep,
            "kept": kept,
            "layer_params_kept": share_of(result, teacher, "params"),
            "note": note,
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
        batches = self.calibration(section.calibration_examples)
        statistics = collect_statistics(
            student,
            tqdm(batches, desc="Calibrating", leave=False, disable=not self.processes.is_main_process),
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
        return plan, statistics

    def calibration(self, examples: int) -> DataLoader:
        """Batches of like length of the first rows of the shuffled training data."""
        train = self.data.train.shuffle(seed=self.recipe.seed)
        rows = train.select(range(min(examples, len(train))))
        rows = rows.select(np.argsort(rows[LENGTH], kind="stable"))
        known = {*self.tokenizer.model_input_names, "position_ids", "labels"}
        rows = rows.remove_columns([name for name in rows.column_names if name not in known])
        return DataLoader(rows, batch_size=CALIBRATION_BATCH, collate_fn=self.collator)  # type: ignore[arg-type]

    def recover(self, folder: Path, student_dir: Path, teacher_dir: Path, last: bool) -> dict[str, Any]:
        """Distil the teacher into the pruned student, or into the one that was given."""
        section = self.recipe.distillation
        assert section is not None
        if self.recipe.pruning is None:
            assert self.recipe.student is not None
            set_seed(self.recipe.seed)
            student = load_for_task(resolve_path(self.recipe.student.model), self.data.task)
        else:
            student = load_pretrained(student_dir, dtype=torch.float32)
        losses = section.losses.model_dump(mode="json", exclude_none=True)
        teacher = load_pretrained(teacher_dir, dtype=torch.float32)
        student = self._train(student, teacher, folder / "student", "final" if last else "recovery", losses)
        metrics = self.evaluate(student) if self.processes.is_main_process else {"score": 0.0}
        return {"score": metrics["score"], "metrics": metrics}

    def _train(
        self, model: PreTrainedModel, teacher: PreTrainedModel | None, target: Path, stage: str, losses: dict[str, Any]
    ) -> PreTrainedModel:
        """Train from the last whole checkpoint of this stage and save to `target`."""
        work = _checkpoints(target)
        args = DistillationConfig(
            output_dir=str(work),
            losses=losses,
            teacher_dtype=self.recipe.teacher.dtype,
            **self.recipe.training(stage),  # type: ignore[arg-type]
        )
        trainer = DistillationTrainer(
            model=model,
            teacher=teacher,
            args=args,
            train_dataset=self.data.train,
            eval_dataset=self.data.validation,
            data_collator=self.collator,
            processing_class=self.tokenizer,
            compute_metrics=None if self.data.task.is_language_model else self._compute_metrics,
            callbacks=[MarkComplete()],
        )
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(work))
        if self.processes.is_main_process:
            with written_whole(target) as path:
                self.save(trainer.accelerator.unwrap_model(trainer.model), path)
        self.processes.wait_for_everyone()
        return self.load(target)

    def _compute_metrics(self, given: EvalPrediction) -> dict[str, float]:
        """The task's metrics on held-out rows, for the Trainer's own evaluation."""
        task, logits = self.data.task, np.asarray(given.predictions)
        predictions = logits.squeeze(-1) if task.kind == "regression" else logits.argmax(-1)
        return compute_metrics(task, predictions.tolist(), np.asarray(given.label_ids).tolist())

    def clean(self, target: Path) -> None:
        """Remove the checkpoints of a stage that is recorded."""
        if self.processes.is_main_process:
            shutil.rmtree(_checkpoints(target), ignore_errors=True)

    def report(
        self,
        teacher_dir: Path,
        student_dir: Path,
        teacher: Mapping[str, Any],
        rounds: list[dict[str, Any]],
        seconds: float,
    ) -> dict[str, Any]:
        """Student, metrics.json, report and card, from the results of the stages before."""
        from distill_llm.report import write_card, write_report  # matplotlib is slow to import
        from distill_llm.report.tables import percent

        with written_whole(self.folder / "student") as path:
            shutil.copytree(student_dir, path, ignore=shutil.ignore_patterns("training_args.bin"))
        metrics = collect_metrics(
            self.recipe,
            self.data.task,
            self.load(teacher_dir),
            self.load(student_dir),
            teacher,
            rounds,
            seconds,
        )
        with written_whole(self.folder / "metrics.json") as path:
            path.write_text(json.dumps(metrics, indent=2) + "\n")
        write_report(self.folder, metrics)
        write_card(self.folder / "student", metrics, self.recipe.to_yaml())
        kept = f"{percent(metrics['layer_params_kept'])} of the layers' parameters"
        speed = f"speed-up {metrics['speedup']:.2f}x on {metrics['device']}"
        return {"summary": f"retention {percent(metrics['retention'])}, {kept}, {speed}"}

    def push(self) -> dict[str, Any]:
        """Upload the student."""
        from distill_llm.hub import push

        assert self.recipe.hub is not None
        return {"url": push(self.folder / "student", self.recipe.hub.repo_id, private=self.recipe.hub.private)}


def _checkpoints(target: Path) -> Path:
    """Where the Trainer of a stage keeps its checkpoints."""
    return target.with_name(target.name + "-training")


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
