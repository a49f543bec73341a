"""Stage `teacher-benchmarks`: the teacher's scores by lm-evaluation-harness, which no change of the student makes stale."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from distill_llm.checks.evaluate import benchmarks_of
from distill_llm.evaluation.harness import run_benchmarks
from distill_llm.metrics.errors import shown_score
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.recipe.recipe import Recipe


class TeacherBenchmarks(Stage):
    """Leaves nothing in the run folder but its scores in state.json; the stage `report` sets the student's beside them."""

    name = "teacher-benchmarks"

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where the recipe names benchmarks."""
        return recipe.evaluation.harness is not None

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher."""
        return (self.teacher,)

    def identity(self, recipe: Mapping[str, Any]) -> Any:
        """The benchmarks."""
        return (recipe.get("evaluation") or {}).get("harness")

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Score the teacher."""
        run, path = self.run, self.teacher.model
        benchmarks = benchmarks_of(run.recipe)
        assert benchmarks is not None and path is not None
        model = run.load(path, run.teacher_dtype)
        scores = run_benchmarks(model, run.opened.teacher.tokenizer, benchmarks, run.recipe.evaluation.batch_size)
        return {"scores": [asdict(each) for each in scores]}

    def line(self, result: Result) -> list[str]:
        """Its scores."""
        return [f"{each['task']} {each['metric']} {shown_score(each)}" for each in result["scores"]]
