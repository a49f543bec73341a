"""What the stages of a run share: recipe, data, tokenizer, devices, and how models are loaded, saved and scored."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.checks.recipe import Opened, encoded_rows
from distill_llm.checks.tokenizers import teacher_rows
from distill_llm.common.finite import check_weights
from distill_llm.common.processes import open_processes
from distill_llm.data.embeddings import EmbeddingCollator
from distill_llm.data.encoding import collator
from distill_llm.data.padding import Collator
from distill_llm.data.tasks import TaskData
from distill_llm.evaluation.evaluate import evaluate_model
from distill_llm.evaluation.retokenized import per_token_of, predicted_tokens
from distill_llm.evaluation.rules import RECIPE_FIELDS
from distill_llm.metrics.errors import shown_score
from distill_llm.models.checkpoint import converted, load_pretrained, name_unnamed
from distill_llm.models.finding import OpenModel
from distill_llm.pipeline.augmentation import augmented
from distill_llm.pipeline.listener import Listener, StageDone
from distill_llm.pipeline.synthetic_rows import made_rows, real_test

METRICS, PAGE, DISAGREEMENTS = "metrics.json", "report.html", "disagreements.json"
"""Files that the report stage leaves in the run folder."""


class Context:
    """What the stages of a run share. Rows are encoded on first use.

    Args:
        opened: the recipe, and what the checks opened and read for it.
        listener: is told what the run does, on process 0.
    """

    def __init__(self, opened: Opened, listener: Listener | None = None):
        self.listener = listener or Listener()
        self.opened, self.recipe, self.folder = opened, opened.recipe, Path(opened.recipe.output_dir)
        self.processes = open_processes()
        self.teacher_path = opened.teacher.path
        self.student_dir = self.folder / "student"
        self.metrics_file, self.report_file = self.folder / METRICS, self.folder / "report.md"
        self.page_file, self.disagreements_file = self.folder / PAGE, self.folder / DISAGREEMENTS

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the rows and the student, and of the teacher unless it keeps its own."""
        return self.opened.reader.tokenizer

    @cached_property
    def data(self) -> TaskData:
        """The encoded rows. Process 0 tokenizes; the others read its cache.

        Of a run without data they are there once its first stage is done.
        """
        if self.recipe.data.synthetic is not None:
            test = made_rows(self.folder, "test") if self.real_test is None else self.real_test
            return TaskData(self.opened.data.task, made_rows(self.folder, "train"), None, test)
        with self.processes.main_process_first():
            return encoded_rows(self.opened)

    @cached_property
    def real_test(self) -> Dataset | None:
        """Of a run without data, the encoded rows to score on, where it has real ones. All processes ask for it together."""
        with self.processes.main_process_first():
            return real_test(self.opened)

    @cached_property
    def collator(self) -> Collator:
        """Pads batches of this task."""
        plain = collator(self.opened.data.task, self.tokenizer, self.recipe.seed)
        synthetic = self.recipe.data.synthetic
        return EmbeddingCollator(plain) if synthetic is not None and synthetic.embeds else plain

    @cached_property
    def teacher_data(self) -> tuple[TaskData, Collator]:
        """The encoded rows that the teacher is scored on, and their collator: its own where its tokenizer is another."""
        if self.recipe.teacher.tokenizer is None:
            return self.data, self.collator
        rows = teacher_rows(self.recipe, self.opened.data, self.opened.teacher)
        return rows, collator(rows.task, self.opened.teacher.tokenizer, self.recipe.seed)

    @cached_property
    def lessons(self) -> tuple[Dataset, Collator]:
        """The rows that a student learns from, and the collator of its batches: augmented where the recipe says so."""
        return augmented(self.opened, self.data.train, self.collator)

    @cached_property
    def teacher_dtype(self) -> torch.dtype:
        """The dtype in which the teacher is scored and measured: its checkpoint's, even if the run fine-tunes it in fp32."""
        return _dtype_of(self.opened.teacher)

    @cached_property
    def student_dtype(self) -> torch.dtype:
        """The dtype in which students are scored and saved: that of the checkpoint that they are made from."""
        return _dtype_of(self.opened.student or self.opened.teacher)

    def load(
        self, path: str | Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> PreTrainedModel:
        """A finished model of this run. By default it is in fp32, to work on its weights, and on this process's device."""
        of_teacher = str(path) in (str(self.teacher_path), str(self.folder / "teacher"))  # no student's code is trusted
        trusted = self.recipe.teacher.trust_remote_code and of_teacher
        model = load_pretrained(path, trusted, dtype=dtype)
        return model.to(device or self.processes.device)  # type: ignore[arg-type]

    def as_written(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model in the dtype of a saved student and on this process's device; a copy, unless it already is."""
        device = self.processes.device
        here = model.dtype == self.student_dtype and model.device.type == device.type
        return model if here else converted(model, self.student_dtype, device).to(device)  # type: ignore[arg-type]

    def save(self, model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
        """Save model and tokenizer. Give `weights` if the model's own are sharded over processes.

        Classes without names get the task's.

        Raises:
            NotFinite: a weight is nan or infinite, such as one that is too large for the student's dtype.
        """
        fix = "nothing was saved: work in float32 or bfloat16, and train at a lower learning_rate"
        check_weights(weights or model, fix)
        name_unnamed(model.config, self.opened.data.task)
        model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)

    def evaluate(self, model: PreTrainedModel) -> dict[str, float]:
        """Metrics on the reported split; if rows are held out, also their score as `validation`, to choose settings by."""
        metrics = self._measured(model, self.data.test)
        if self.data.validation is not None:
            held_out = self._measured(model, self.data.validation)
            metrics["validation"] = held_out["score"]
        return metrics

    def _measured(self, model: PreTrainedModel, rows: Dataset, pad: Collator | None = None) -> dict[str, float]:
        size, task = self.recipe.evaluation.batch_size, self.data.task
        return evaluate_model(model, rows, task, pad or self.collator, batch_size=size, fields=RECIPE_FIELDS)

    def _evaluate_teacher(self, model: PreTrainedModel) -> dict[str, float]:
        """As `evaluate`; a teacher reads its own tokens, and its perplexity is counted per token of the student."""
        if self.recipe.teacher.tokenizer is None:
            return self.evaluate(model)
        rows, pad = self.teacher_data
        found = [
            per_token_of(self._measured(model, theirs, pad), predicted_tokens(theirs), predicted_tokens(ours))
            for theirs, ours in ((rows.test, self.data.test), (rows.validation, self.data.validation))
            if theirs is not None and ours is not None
        ]
        return found[0] | ({"validation": found[1]["score"]} if len(found) > 1 else {})

    def scored(self, path: str | Path, dtype: torch.dtype, of_teacher: bool = False) -> dict[str, Any]:
        """The result of a stage that trained a model: its scores, on process 0; empty on the others."""
        clear_device_cache(garbage_collection=True)  # cycles in a Trainer hold the weights, the moments and the teacher
        if not self.processes.is_main_process:
            return {}
        model = self.load(path, dtype)
        metrics = self._evaluate_teacher(model) if of_teacher else self.evaluate(model)
        return {"score": metrics["score"], "metrics": metrics}

    def named(self, metrics: Mapping[str, Any]) -> str:
        """A score after the name of its metric, with its standard error, to print."""
        return f"{self.data.task.main_metric} {shown_score(metrics)}"

    def say(self, what: Any) -> None:
        """Tell the user a line or a table, on process 0."""
        if self.processes.is_main_process:
            self.listener.say(what)

    def done(self, stage: StageDone) -> None:
        """Tell the user of a finished stage, on process 0."""
        if self.processes.is_main_process:
            self.listener.done(stage)


def _dtype_of(model: OpenModel) -> torch.dtype:
    """The dtype that a checkpoint's config.json names; fp32 if it names none."""
    dtype: Any = model.config.dtype
    return dtype or torch.float32
