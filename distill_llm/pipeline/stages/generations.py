"""Stages `round-N/generation-K` and `round-N/generations`: students that teach the next one, and the choice among them."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_llm.common.files import linked_or_copied, written_whole
from distill_llm.evaluation.together import Together
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.pipeline.stages.recover import Recover
from distill_llm.recipe.recipe import Recipe


class Generation(Recover):
    """Leaves `round-N/generation-K`, from the second on: it begins where the first began, and learns from the one before."""

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where there are several."""
        return recipe.distillation is not None and recipe.distillation.generations is not None

    @property
    def number(self) -> int:
        """Counted from 1; the first is that of `recover`."""
        return 2 + sum(isinstance(stage, Generation) for stage in self.earlier)

    @property
    def name(self) -> str:
        """`round-1/generation-2`."""
        return f"round-{self.round}/generation-{self.number}"

    @property
    def model(self) -> Path:
        """The student."""
        return self.run.folder / self.name

    @property
    def first(self) -> Recover:
        """The stage that left the first student of these."""
        found = [stage for stage in self.earlier if isinstance(stage, Recover) and not isinstance(stage, Generation)]
        return found[-1]

    @property
    def start(self) -> Stage:
        """Where the first began."""
        return self.first.start

    @property
    def before(self) -> Stage:
        """The one that teaches."""
        return self.student

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The teacher, whose classes have the names; where it begins; and the generation before."""
        return self.teacher, self.start, self.before

    @property
    def seed(self) -> int:
        """Another for each, so that they differ by more than their teachers."""
        return (self.run.recipe.seed + self.number - 1) % 2**32

    def source(self, weights: Any = None) -> Any:
        """The generation before, as a model in memory."""
        path = self.before.model
        assert path is not None
        return self.in_memory(path, False)

    def line(self, result: Result) -> list[str]:
        """Its score and its teacher."""
        before = "recover" if self.number == 2 else f"generation-{self.number - 1}"
        return [self.run.named(result["metrics"]), f"learnt from round-{self.round}/{before}"]

    def row(self, result: Result) -> dict[str, Any]:
        """Nothing: `generations` has a row for each."""
        return {}


class Generations(Stage):
    """Leaves `round-N/chosen`: the generation with the best score on held-out rows; the last one where no rows are held out."""

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where there are several."""
        return Generation.wanted(recipe)

    @property
    def name(self) -> str:
        """`round-1/generations`."""
        return f"round-{self.round}/generations"

    @property
    def students(self) -> list[Recover]:
        """The stages of all generations, in order."""
        found = [stage for stage in self.earlier if isinstance(stage, Recover) and stage.round == self.round]
        return [
            stage for stage in found if type(stage) in (Recover, Generation)
        ]  # masks learn before there is a student

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """All generations."""
        return tuple(self.students)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """The chosen student."""
        return (self.model,)

    @property
    def model(self) -> Path:
        """The chosen student."""
        return self.run.folder / f"round-{self.round}" / "chosen"

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Choose one, and score all together where the recipe asks for it."""
        run, stages = self.run, self.students
        metrics = [dict(results[stage.name]["metrics"]) for stage in stages]
        chosen = choice([each.get("validation") for each in metrics], run.data.task.higher_is_better)
        with written_whole(self.model, folder=True) as target:
            shutil.copytree(stages[chosen].model, target, copy_function=linked_or_copied, dirs_exist_ok=True)
        rows = [
            {"generation": number, "learnt_from": number - 1, "score": each["score"], "metrics": each}
            for number, each in enumerate(metrics, 1)
        ]
        by = "held-out rows" if "validation" in metrics[0] else None
        section = run.recipe.distillation.generations if run.recipe.distillation else None
        found = {"chosen": chosen + 1, "by": by, "metrics": metrics[chosen], "students": rows}
        if section is None or not section.ensemble:
            return found
        models = [run.load(stage.model, run.student_dtype) for stage in stages]
        return {**found, "ensemble": run.evaluate(Together(models))}  # type: ignore[arg-type]

    def line(self, result: Result) -> list[str]:
        """Which one is the student, and how good all are together."""
        why = "the best on held-out rows" if result["by"] else "the last: no rows are held out to choose by"
        said = [f"generation {result['chosen']} of {len(result['students'])} is the student ({why})"]
        both = result.get("ensemble")
        return said + ([f"all together {self.run.named(both)}"] if both else [])

    def row(self, result: Result) -> dict[str, Any]:
        """The chosen student is the round's, and what is known of all."""
        known = {name: result[name] for name in ("chosen", "by", "students", "ensemble") if name in result}
        return {"score_recovered": result["metrics"]["score"], "recovered": result["metrics"], "generations": known}


def choice(scores: list[float | None], higher_is_better: bool) -> int:
    """The place of the best score, of equal ones the first; the last place where scores are not known."""
    known = [score for score in scores if score is not None]
    if len(known) < len(scores):
        return len(scores) - 1
    return scores.index((max if higher_is_better else min)(known))
