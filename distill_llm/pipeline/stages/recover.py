"""Stage `round-N/recover`: distil the teacher into the pruned student, or into the one that was given."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from distill_llm.checks.cached import check_cached_weights
from distill_llm.data.tasks import label_names
from distill_llm.models.checkpoint import load_for_task, load_pretrained
from distill_llm.models.configs import open_config
from distill_llm.models.quantized import load_teacher
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.prices import precision_of
from distill_llm.pipeline.result import taught_by
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.train_model import Fields, remove_checkpoints, train_model
from distill_llm.recipe.recipe import Recipe
from distill_llm.report.report import taught_words
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.ensemble import Ensemble
from distill_llm.training.augmented import shown


class Recover(Stage):
    """Leaves `round-N/student`, in fp32; one that was quantized, in the precision of the training.

    The last round trains with the fields of `final`.
    """

    together = True
    trained = True

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where there is a distillation section."""
        return recipe.distillation is not None

    @property
    def name(self) -> str:
        """`round-1/recover`."""
        return f"round-{self.round}/recover"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher, and the student as it is."""
        return self.teacher, self.student

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The recovered student."""
        return (self.model,)

    @property
    def model(self) -> Path:
        """The recovered student."""
        return self.run.folder / f"round-{self.round}" / "student"

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Train and score."""
        run, teacher = self.run, self.teacher.model
        section = run.recipe.distillation
        assert section is not None and teacher is not None
        rounds = run.recipe.pruning.rounds if run.recipe.pruning else 1
        fields: Fields = "final" if self.round == rounds else "recovery"
        trained = train_model(  # no name here holds the models, so that they go when it returns
            run,
            with_adapters(run.recipe, self._student(teacher, fields)),
            recovery_teacher(run, teacher, fields) if section.losses.needs_teacher else None,
            self.model,
            fields,
            section.losses.model_dump(mode="json", exclude_none=True),
        )
        return {**run.scored(self.model, run.student_dtype), **trained}

    def tidy(self) -> None:
        """Remove the checkpoints of the training."""
        remove_checkpoints(self.run, self.model)

    def line(self, result: Result) -> list[str]:
        """Its score, its teachers where there are several, and how much of the rows was changed."""
        changed = [shown(result["augmented"])] if "augmented" in result else []
        return [self.run.named(result["metrics"]), *filter(None, [taught_words(taught_by(self.run.recipe))]), *changed]

    def row(self, result: Result) -> dict[str, Any]:
        """The metrics after recovery, and how much of the rows was changed."""
        changed = {"augmented": result["augmented"]} if "augmented" in result else {}
        return {"score_recovered": result["score"], "recovered": result["metrics"], **changed}

    def _student(self, teacher: Path | str, fields: Fields) -> PreTrainedModel:
        """The pruned student of a folder, or the one that was given, with a head for the task."""
        recipe, opened, path = self.run.recipe, self.run.opened, self.student.model
        if recipe.student is not None and recipe.student.quantization is not None:
            base = opened.student.path if opened.student else path
            assert base is not None
            dtype = precision_of(recipe.training(fields)) or torch.float32
            return load_teacher(base, recipe.student.quantization, dtype, self.run.processes.device)
        if recipe.pruning is not None:
            assert path is not None
            return load_pretrained(path, dtype=torch.float32)
        assert opened.student is not None
        set_seed(recipe.seed)
        tuned = recipe.teacher.train is not None  # in this run, after the teacher was opened
        names = label_names(open_config(teacher, recipe.teacher.trust_remote_code) if tuned else opened.teacher.config)
        return load_for_task(opened.student.path, self.run.data.task, names, of_task=True, config=opened.student.config)


def recovery_teacher(run: Context, path: Path | str, fields: Fields) -> PreTrainedModel | Teacher:
    """What the student learns from: the teacher, the teacher with quantized weights, its cached outputs, or several."""
    section, precision = run.recipe.teacher, precision_of(run.recipe.training(fields))
    if section.cache is not None:
        cache = check_cached_weights(run.opened)
        assert cache is not None
        return cache

    def loaded(path: Path | str, trusted: bool) -> PreTrainedModel:
        if section.quantization is None:
            dtype = getattr(torch, section.dtype) if section.dtype else precision or torch.float32
            return load_pretrained(path, trusted, dtype=dtype)
        dtype = getattr(torch, section.dtype or "bfloat16")
        return load_teacher(path, section.quantization, dtype, run.processes.device, trusted)

    first, ensemble = loaded(path, section.trust_remote_code), section.ensemble
    if ensemble is None:
        return first
    models = [first, *(loaded(other.path, False) for other in run.opened.others)]
    return Ensemble(models, ensemble.weights, ensemble.average, ensemble.confidence)


def with_adapters(recipe: Recipe, student: PreTrainedModel) -> Any:
    """The student, with adapters around it where the recipe trains only those."""
    fields = recipe.student.peft if recipe.student else None
    if fields is None:
        return student
    from peft import LoraConfig, get_peft_model

    set_seed(recipe.seed)
    return get_peft_model(student, LoraConfig(**fields))
