"""The stages of a run: each leaves its files whole in the run folder and returns what state.json keeps."""

import json
import shutil
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from rich.console import Console
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer, EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from distill_llm.checks.recipe import check_data
from distill_llm.common.files import written_whole
from distill_llm.common.processes import open_processes
from distill_llm.data.encoding import LENGTH, Collator, collator, encode
from distill_llm.data.tasks import TaskData, label_names
from distill_llm.evaluation.evaluate import compute_metrics, evaluate_model
from distill_llm.models.adapters import merged
from distill_llm.models.checkpoint import converted, load_for_task, load_pretrained
from distill_llm.models.finding import check_tokens, resolve_model
from distill_llm.models.quantized import load_teacher
from distill_llm.pipeline.caching import cached_teacher
from distill_llm.pipeline.folder import MarkComplete, last_complete_checkpoint
from distill_llm.pipeline.result import collect_metrics
from distill_llm.pipeline.rounds import Cutter
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning.budgets import share_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.recipe.sections import PruningSection
from distill_llm.teachers.base import Teacher
from distill_llm.training.config import DistillationConfig
from distill_llm.training.trainer import DistillationTrainer

# At most, of a batch: its activations and a language model's logits are held.
CALIBRATION_BATCH, CALIBRATION_TOKENS = 32, 2048


class Stages:
    """The data and device of a run, and the work of its stages.

    Args:
        recipe: checked already.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.folder = recipe, Path(recipe.output_dir)
        self.processes = open_processes()
        self.teacher_path = resolve_model(recipe.teacher.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's, which is the student's too."""
        return AutoTokenizer.from_pretrained(self.teacher_path)

    @cached_property
    def data(self) -> TaskData:
        """Encoded rows; process 0 tokenizes, the others read its cache."""
        with self.processes.main_process_first():
            rows = encode(check_data(self.recipe), self.tokenizer, self.recipe.data.max_length)
            return check_tokens(rows, self.tokenizer, self.teacher_path)

    @cached_property
    def collator(self) -> Collator:
        """Pads batches of this task."""
        return collator(self.data.task, self.tokenizer, self.recipe.seed)

    @cached_property
    def teacher_dtype(self) -> torch.dtype:
        """What the teacher is scored and measured in: its checkpoint's, also where it is fine-tuned here, in fp32."""
        return _dtype_of(self.teacher_path)

    @cached_property
    def student_dtype(self) -> torch.dtype:
        """What students are scored in and the finished one is written in: that of the checkpoint they are made from."""
        given = self.recipe.student.model if self.recipe.student else None
        return self.teacher_dtype if given is None else _dtype_of(resolve_model(given))

    def load(
        self, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> PreTrainedModel:
        """A finished model of this run, by default on this process's device; in fp32 where its weights are worked on."""
        return load_pretrained(path, dtype=dtype).to(device or self.processes.device)  # type: ignore[arg-type]

    def as_written(self, model: PreTrainedModel) -> PreTrainedModel:
        """A model in the dtype of a finished student on this process's device: itself where it is that, else a copy."""
        device = self.processes.device
        here = model.dtype == self.student_dtype and model.device.type == device.type
        return model if here else converted(model, self.student_dtype, device).to(device)  # type: ignore[arg-type]

    def save(self, model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Model and tokenizer; `weights` where the model's own are divided among processes."""
        model.save_pretrained(folder, state_dict=weights)
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
            return self._scored(self.teacher_path, self.teacher_dtype)
        set_seed(self.recipe.seed)
        target = self.folder / "teacher"
        self._train(load_for_task(self.teacher_path, self.data.task), None, target, "teacher", {"labels": {}})
        return self._scored(target, self.teacher_dtype)

    def _scored(self, path: str | Path, dtype: torch.dtype) -> dict[str, Any]:
        """The result of a stage, from process 0: what its finished model scores. Whatever trained that is freed before."""
        clear_device_cache(garbage_collection=True)  # cycles in a Trainer hold the weights, the moments and the teacher
        if not self.processes.is_main_process:
            return {}
        metrics = self.evaluate(self.load(path, dtype))
        return {"score": metrics["score"], "metrics": metrics}

    def prune(self, folder: Path, student_dir: Path, teacher_dir: Path, number: int) -> dict[str, Any]:
        """Statistics, plan, pruned and compensated model, both scored. All processes collect; process 0 writes."""
        section = self.recipe.pruning
        assert section is not None
        where = torch.device("cpu") if section.offload else self.processes.device
        student = self.load(student_dir, device=where).eval()
        teacher = student if student_dir == teacher_dir else self.load(teacher_dir, device=where).eval()
        cutter = self.cutter(section)
        if section.layers is not None:
            cut = cutter.cut_layers(student)
            keep = cut.kept
        else:
            assert section.keep is not None
            keep = kept_after(section.keep, number, section.rounds, section.schedule)
            own = section.statistics.expanduser() if section.statistics is not None and number == 1 else None
            folder.mkdir(parents=True, exist_ok=True)
            cut = cutter.cut(student, teacher, keep, own or folder / "statistics.safetensors")
        if not self.processes.is_main_process:
            return {}
        self.show(cut.plan, student, folder, f"round {number}")
        with written_whole(folder / "pruned", folder=True) as path:
            self.save(cut.model, path)
        plan, compensated = cut.plan, cut.compensated
        result = {
            "keep": keep,
            "kept": cut.kept,
            "layer_params_kept": share_of(cut.model, teacher, "params"),
            "note": f"round {number} {plan.note}" if plan.note else None,
        }
        model = self.as_written(cut.model)
        del teacher, cut  # two models at a time
        scores = self.evaluate(model)
        if not compensated:
            return {**result, **_both(scores, None)}
        del model
        return {**result, **_both(self.evaluate(self.as_written(prune(student, plan))), scores)}

    def cutter(self, section: PruningSection) -> Cutter:
        """What cuts models as the recipe says, on its calibration rows."""
        device = self.processes.device if section.offload else None
        return Cutter(self.recipe, partial(self.calibration, section.calibration_examples), device)

    def show(self, plan: PruningPlan, model: PreTrainedModel, folder: Path, title: str) -> None:
        """Save a plan and its picture, and print its table."""
        from distill_llm.report.plans import plan_figure, plan_table

        folder.mkdir(parents=True, exist_ok=True)
        plan.save(folder / "plan.json")
        plan_figure(plan, model, folder / "plan.png")
        Console().print(plan_table(plan, model, title))

    def calibration(self, examples: int, cut: int = 0) -> DataLoader:
        """Batches of like length of rows of the shuffled training data: the first ones, for a later cut those after them."""
        train = self.data.train.shuffle(seed=self.recipe.seed)
        size = min(examples, len(train))
        rows = train.select([(cut * size + i) % len(train) for i in range(size)])
        rows = rows.select(np.argsort(rows[LENGTH], kind="stable"))
        batch_size = max(1, min(CALIBRATION_BATCH, CALIBRATION_TOKENS // max(rows[LENGTH])))
        known = {*self.tokenizer.model_input_names, "position_ids", "labels"}
        rows = rows.remove_columns([name for name in rows.column_names if name not in known])
        return DataLoader(rows, batch_size=batch_size, collate_fn=self.collator)  # type: ignore[arg-type]

    def recover(self, folder: Path, student_dir: Path, teacher_dir: Path, last: bool) -> dict[str, Any]:
        """Distil the teacher into the pruned student, or into the one that was given."""
        section = self.recipe.distillation
        assert section is not None
        stage: Literal["recovery", "final"] = "final" if last else "recovery"
        self._train(  # no name here holds the models, so that they go when it returns
            self._with_adapters(self._student(student_dir, teacher_dir)),
            self._recovery_teacher(teacher_dir, stage) if section.losses.needs_teacher else None,
            folder / "student",
            stage,
            section.losses.model_dump(mode="json", exclude_none=True),
        )
        return self._scored(folder / "student", self.student_dtype)

    def _student(self, path: Path, teacher_dir: Path) -> PreTrainedModel:
        """The pruned student of a folder, or the one that was given, with a head for the task."""
        if self.recipe.pruning is not None:
            return load_pretrained(path, dtype=torch.float32)
        assert self.recipe.student is not None and self.recipe.student.model is not None
        set_seed(self.recipe.seed)
        names = label_names(AutoConfig.from_pretrained(teacher_dir))
        return load_for_task(resolve_model(self.recipe.student.model), self.data.task, names, of_task=True)

    def _recovery_teacher(self, path: Path, stage: Literal["recovery", "final"]) -> PreTrainedModel | Teacher:
        """What the student learns from: the teacher, its weights in fewer bits, or what it said once."""
        section, training = self.recipe.teacher, self.recipe.training(stage)
        precision = "bfloat16" if training.get("bf16") else "float16" if training.get("fp16") else None
        if section.cache is not None:
            return cached_teacher(section.cache, str(path), self.tokenizer, self.data.train)
        if section.quantization is None:
            return load_pretrained(path, dtype=getattr(torch, section.dtype or precision or "float32"))
        dtype = getattr(torch, section.dtype or "bfloat16")
        return load_teacher(path, section.quantization, dtype, self.processes.device)

    def _with_adapters(self, student: PreTrainedModel) -> Any:
        """The student, with adapters around it where only they are to learn."""
        fields = self.recipe.student.peft if self.recipe.student else None
        if fields is None:
            return student
        from peft import LoraConfig, get_peft_model

        set_seed(self.recipe.seed)
        return get_peft_model(student, LoraConfig(**fields))

    def _train(
        self,
        model: PreTrainedModel,
        teacher: PreTrainedModel | Teacher | None,
        target: Path,
        stage: str,
        losses: dict[str, Any],
    ) -> None:
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
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        trainer.train(resume_from_checkpoint=last_complete_checkpoint(work))
        weights = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
        if self.processes.is_main_process:
            with written_whole(target, folder=True) as path:
                self.save(merged(trainer.accelerator.unwrap_model(trainer.model)), path, weights)
        trainer.accelerator.free_memory()  # ends DeepSpeed's engine, which nothing else does

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
        from distill_llm.report import write_card, write_report
        from distill_llm.report.tables import percent

        student = self.load(student_dir, self.student_dtype)
        with written_whole(self.folder / "student", folder=True) as path:
            self.save(student, path)
        metrics = collect_metrics(
            self.recipe,
            self.data.task,
            self.load(teacher_dir, self.teacher_dtype),
            student,
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
        from distill_llm.report.hub import push

        assert self.recipe.hub is not None
        return {"url": push(self.folder / "student", self.recipe.hub.repo_id, private=self.recipe.hub.private)}


def _both(pruned: dict[str, float], compensated: dict[str, float] | None) -> dict[str, Any]:
    """The part of a result with the metrics before and after compensation; None: nothing was compensated."""
    return {
        "score_pruned": pruned["score"],
        "score_compensated": compensated["score"] if compensated else None,
        "pruned": pruned,
        "compensated": compensated,
    }


def _dtype_of(path: str | Path) -> torch.dtype:
    """The dtype that a checkpoint's config.json gives its weights; fp32 where it gives none."""
    return AutoConfig.from_pretrained(path).dtype or torch.float32


def _checkpoints(target: Path) -> Path:
    """Where the Trainer of a stage keeps its checkpoints."""
    return target.with_name(target.name + "-training")


def kept_after(keep: float, number: int, rounds: int, schedule: str) -> float:
    """The share of the teacher's layers that stays after round `number` of `rounds`.

    "linear" removes the same share in every round; "cubic" removes most in the first ones (Zhu and Gupta 2017, equation 1).
    """
    left = 1 - number / rounds
    return keep + (1 - keep) * (left if schedule == "linear" else left**3)
