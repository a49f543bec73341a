"""Stage `push/REPO_ID`: upload the student. Another repository in the recipe is another stage."""

from collections.abc import Mapping
from typing import Any

from distill_llm.pipeline.stage import Result, Stage
from distill_llm.recipe.recipe import Recipe


class Push(Stage):
    """Leaves nothing in the run folder."""

    sections = ("hub",)

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where there is a hub section."""
        return recipe.hub is not None

    @property
    def name(self) -> str:
        """`push/me/student`."""
        assert self.run.recipe.hub is not None
        return f"push/{self.run.recipe.hub.repo_id}"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The stage that left the folder `student/` with its card."""
        return tuple(each for each in self.earlier if self.run.student_dir in each.outputs)

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Upload."""
        from distill_llm.report.hub import push

        hub = self.run.recipe.hub
        assert hub is not None
        return {"url": push(self.run.student_dir, hub.repo_id, private=hub.private)}

    def line(self, result: Result) -> None:
        """Nothing: the upload has shown its progress."""
