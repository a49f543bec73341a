"""Stage `export`: the finished student for other programs."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distill_llm.export import export, find_format
from distill_llm.pipeline.stage import Result, Stage
from distill_llm.recipe.recipe import Recipe


class Export(Stage):
    """Leaves `export/`: a file or folder per format that the recipe names."""

    name = "export"
    sections = ("export",)

    @classmethod
    def wanted(cls, recipe: Recipe) -> bool:
        """Where the recipe names a format."""
        return bool(recipe.export)

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The stage that left the folder `student/`."""
        return tuple(each for each in self.earlier if self.run.student_dir in each.outputs)

    @property
    def outputs(self) -> tuple[Path, ...]:
        """What is written."""
        found = [find_format(section.format, section.quantize) for section in self.run.recipe.export]
        return tuple(self.run.folder / "export" / kind.default_name.format(type=chosen) for kind, chosen in found)

    def identity(self, recipe: Mapping[str, Any]) -> Any:
        """The formats."""
        return recipe.get("export")

    def work(self, results: Mapping[str, Result]) -> dict[str, Any]:
        """Write them, in place of those of another start."""
        shutil.rmtree(self.run.folder / "export", ignore_errors=True)
        done = [
            export(self.run.student_dir, section.format, output, section.quantize)
            for section, output in zip(self.run.recipe.export, self.outputs, strict=True)
        ]
        return {"summary": "; ".join(each.summary for each in done), "notes": [n for each in done for n in each.notes]}

    def line(self, result: Result) -> list[str]:
        """What was written, and what to know of it."""
        return [result["summary"], *result["notes"]]
