"""Stages `quantize/train` and `quantize`: the student learns as if it were rounded, and is rounded."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from distill_llm.common.files import written_whole
from distill_llm.measuring.profiling import compare
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.masks import MASKS, masks_in
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.quantizing import calibration_batches
from distill_llm.pipeline.result import side_of
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.stages.recover import Recover
from distill_llm.pipeline.teaching import WEIGHTS, learnt
from distill_llm.pipeline.train_model import Fields, More, train_model
from distill_llm.quantizing.rounding import bytes_in, bytes_of, imitate, quantize
from distill_llm.recipe.quantize import QuantizeSection
from distill_llm.recipe.recipe import Recipe


class QuantizeTraining(Recover):
    """Leaves `quantize/student`, in fp32: the weights that were learnt under rounding, not rounded yet."""

    name = "quantize/train"
    sections = ("quantize",)
    peers: list[Path] = []  # noqa: RUF012 - of the rounds alone
    assistant = None
    fields: Fields = "quantized"

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where the recipe asks for such a training."""
        return recipe.quantize is not None and recipe.quantize.train is not None

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher, the student as it is, and the learnt weights of several teachers."""
        return self.teacher, self.student, *(stage for stage in self.earlier if stage.name == WEIGHTS)

    @property
    def model(self) -> Path:
        """The student that learnt under rounding."""
        return self.run.folder / "quantize" / "student"

    def identity(self, recipe: Mapping[str, Any]) -> Any:
        """All of the section: another scheme asks for other weights."""
        return recipe.get("quantize")

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Train."""
        run, path = self.run, self.student.model
        assert path is not None and run.recipe.distillation is not None
        losses = run.recipe.distillation.losses
        return train_model(
            run,
            imitate(load_pretrained(path, dtype=torch.float32), section_of(run).scheme),
            self.source(learnt(run, results)) if losses.needs_teacher else None,
            self.model,
            self.fields,
            losses.model_dump(mode="json", exclude_none=True),
            More(masks=masks_in(path)),
        )

    def line(self, result: Result) -> list[str]:
        """What was learnt."""
        return [f"learnt with {section_of(self.run).scheme.words}"]

    def row(self, result: Result) -> dict[str, Any]:
        """Nothing: it is of no round."""
        return {}


class Quantize(Stage):
    """Leaves `quantized/`, the student in fewer bits, and measures it beside the student before."""

    name = "quantize"
    sections = ("quantize",)

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where there is a section."""
        return recipe.quantize is not None

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The student as it is."""
        return (self.student,)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The student in fewer bits."""
        return (self.model,)

    @property
    def model(self) -> Path:
        """The student in fewer bits."""
        return self.run.folder / "quantized"

    def identity(self, recipe: Mapping[str, Any]) -> Any:
        """The section, and the batch that is timed."""
        return recipe.get("quantize"), recipe.get("evaluation")

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Round, save, load again, score and time."""
        run, path, section = self.run, self.student.model, section_of(self.run)
        assert path is not None
        whole = run.load(path, run.student_dtype).eval()
        batches = calibration(run, section.calibration_examples) if section.smooth is not None else ()
        with written_whole(self.model, folder=True) as folder:
            run.save(quantize(whole, section.scheme, batches), folder)
            if (masks := masks_in(path)) is not None:
                masks.save(folder / MASKS)
        student = run.load(self.model, run.student_dtype)
        metrics, latency = run.evaluate(student), run.recipe.evaluation.latency
        measured = compare(student, whole, latency.batch_size, latency.sequence_length)
        before = side_of(whole, measured.other, self._before(results)) | {"file_mb": bytes_of(whole) / 1e6}
        after = side_of(student, measured.model, metrics) | {"file_mb": bytes_in(self.model) / 1e6}
        spread = {"speedup_min": measured.speedup_min, "speedup_max": measured.speedup_max}
        told = {"scheme": section.scheme.words, "trained": section.train is not None, "before": before, "after": after}
        return {
            "score": metrics["score"],
            "metrics": metrics,
            "quantization": {**told, "speedup": measured.speedup, **spread, "device": measured.model.device},
        }

    def line(self, result: Result) -> list[str]:
        """The scheme, the score, and what was won."""
        told = result["quantization"]
        sizes = f"{told['before']['file_mb']:.1f} -> {told['after']['file_mb']:.1f} MB"
        return [told["scheme"], self.run.named(result["metrics"]), f"{sizes}, {told['speedup']:.2f}x as fast as before"]

    def _before(self, results: Mapping[str, Result]) -> Mapping[str, Any]:
        """The metrics of the last student of the rounds, which was scored there."""
        rows = [stage.row(results[stage.name]) for stage in reversed(self.earlier) if stage.round]
        scored = [row.get("recovered") or row.get("compensated") or row.get("pruned") for row in rows]
        return next(metrics for metrics in scored if metrics)


def section_of(run: Context) -> QuantizeSection:
    """The section of a recipe that has one."""
    assert run.recipe.quantize is not None
    return run.recipe.quantize


def calibration(run: Context, examples: int) -> Any:
    """Training rows one at a time."""
    rows = run.data.train.shuffle(seed=run.recipe.seed)
    return calibration_batches(rows.select(range(min(examples, len(rows)))), run.tokenizer, run.collator)


def copied(model: Path, folder: Path) -> None:
    """Copy a saved student: transformers does not save again what it has loaded in fewer bits."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
