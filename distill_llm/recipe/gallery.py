"""The shipped recipes, with what each says about itself and the result of its small run."""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_llm.recipe.recipe import Recipe, load_recipe, recipe_folder, recipe_names
from distill_llm.recipe.sections import GallerySection

RESULTS = "results.json"
"""File beside the recipes: by name, what the small run of a recipe gave (see `Result`)."""


@dataclass(frozen=True)
class Result:
    """What the small run of a recipe gave.

    Attributes:
        date: of the run, as YYYY-MM-DD.
        threads: CPU threads that it had.
        data: what it trained on and with how many seeds, in words.
        metrics: the part of the run's metrics.json that tables are made of.
    """

    date: str
    threads: int
    data: str
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A shipped recipe with what it says about itself, and its result if there is one."""

    name: str
    recipe: Recipe
    about: GallerySection
    result: Result | None

    @property
    def group(self) -> str:
        """What a user has who wants it: a kind of model, and time to train or not."""
        kind = {"encoder": "Encoders (BERT and its relatives)", "llm": "LLMs (decoders)"}[self.about.models]
        return f"{kind}, {'without' if self.recipe.distillation is None else 'with'} training of the student"


def entries() -> list[Entry]:
    """The shipped recipes by group, encoders first, and within a group by name."""
    results = json.loads((recipe_folder() / RESULTS).read_text(encoding="utf-8"))
    found = []
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.gallery is not None, f"{name} has no gallery section"
        result = Result(**results[name]) if name in results else None
        found.append(Entry(name, recipe, recipe.gallery, result))
    return sorted(found, key=lambda entry: entry.group)


def groups(found: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by group."""
    by_group: dict[str, list[Entry]] = {}
    for entry in found:
        by_group.setdefault(entry.group, []).append(entry)
    return by_group


def small_run(name: str, section: GallerySection) -> tuple[list[str], Path]:
    """The command lines of a recipe's small run, in order, and its folder. Without `here` it is the recipe as it stands."""
    folder = Path("runs", f"{name}-small" if section.here else name)
    settings = [part for setting in section.here for part in ("--set", setting)]
    parts = ["distill-llm", "run", name, *(["--output-dir", str(folder)] if section.here else []), *settings]
    return [*section.here_before, shlex.join(parts)], folder
