"""Stage `exits`: the threshold at which rows leave a classifier, and its score over its latency; or a language model's drafts."""

from collections.abc import Mapping
from typing import Any

from distill_llm.pipeline.exit_curve import exit_record
from distill_llm.pipeline.exit_drafts import draft_record
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.recipe.recipe import Recipe
from distill_llm.report.drafts import draft_summary


class Exits(Stage):
    """Leaves no file; its result is part of metrics.json, and the threshold or draft of the finished student's config."""

    name = "exits"

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where the student has exits."""
        return recipe.exits is not None

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The student."""
        return (self.student,)

    def identity(self, recipe: Mapping[str, Any]) -> Any:
        """How the student is scored and timed."""
        return recipe.get("evaluation")

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Score and time it."""
        path = self.student.model
        assert path is not None
        record = draft_record if self.run.data.task.is_language_model else exit_record
        return {"exits": record(self.run, self.run.load(path, self.run.student_dtype))}

    def line(self, result: Result) -> list[str]:
        """The threshold or the draft, and what it saves."""
        found = result["exits"]
        if "draft" in found:
            return [draft_summary(found) or "no exit drafts faster than the model writes alone"]
        if found["threshold"] is None:
            return ["no threshold keeps the score of the whole model: rows go through all layers"]
        at = next(point for point in found["curve"] if point["threshold"] == found["threshold"])
        whole = found["curve"][0]
        name = self.run.data.task.main_metric
        return [
            f"rows leave above {found['threshold']:.4g}: {name} {at['score']:.4g} (all layers: {whole['score']:.4g})",
            f"{at['layers']:.1f} of {found['layers']} layers a row, {at['speedup']:.2f}x as fast",
        ]
