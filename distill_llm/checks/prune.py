"""The door of pruning alone: a recipe whose other stages say nothing, into a new folder."""

from distill_llm.checks.recipe import Opened, open_recipe
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.recipe.recipe import Recipe


def open_pruning(recipe: Recipe) -> Opened:
    """As `open_recipe`, once it is known that pruning alone is all that the recipe asks for.

    Raises:
        InputError: one line per fault, also for what pruning alone would leave undone.
    """
    usable_output(recipe.output_dir)
    raise_all(_unused(recipe))
    return open_recipe(recipe)


def _unused(recipe: Recipe) -> list[InputError]:
    """Faults of what a recipe says of a run's other stages, which pruning alone does not have."""
    section = recipe.pruning
    given = {
        "teacher.train": recipe.teacher.train,
        "teacher.cache": recipe.teacher.cache,
        "student": recipe.student,
        "distillation": recipe.distillation,
        "hub": recipe.hub,
        "pruning.layers": section.layers if section else None,
        "pruning.rounds": section.rounds if section and section.rounds > 1 else None,
    }
    fix = "leave it out: this only prunes a model (`distill-llm run` takes a recipe with it)"
    faults = [InputError(name, value, fix=fix) for name, value in given.items() if value is not None]
    if not faults and (section is None or section.keep is None):
        faults = [InputError("pruning.keep", None, "a share above 0, at most 1")]
    return faults
