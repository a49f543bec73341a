"""The door of `prune`: a recipe that only prunes, into a new folder."""

from distill_llm.checks.recipe import Opened, open_recipe
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.recipe.recipe import Recipe


def open_pruning(recipe: Recipe) -> Opened:
    """As `open_recipe`, after a check that the recipe asks for nothing but pruning.

    Raises:
        InputError: one line per fault; also for parts of the recipe that pruning alone would ignore.
    """
    usable_output(recipe.output_dir)
    raise_all(_unused(recipe))
    return open_recipe(recipe)


def _unused(recipe: Recipe) -> list[InputError]:
    """Faults for parts of the recipe that concern other stages of a run."""
    section = recipe.pruning
    given = {
        "teacher.train": recipe.teacher.train,
        "teacher.ensemble": recipe.teacher.ensemble,
        "teacher.cache": recipe.teacher.cache,
        "teacher.moving_average": recipe.teacher.moving_average,
        "teacher.peers": recipe.teacher.peers,
        "teacher.checkpoints": recipe.teacher.checkpoints,
        "teacher.assistant": recipe.teacher.assistant,
        "data.synthetic": recipe.data.synthetic,
        "teacher.server": recipe.teacher.server,
        "student": recipe.student,
        "distillation": recipe.distillation,
        "quantize": recipe.quantize,
        "hub": recipe.hub,
        "pruning.masks": section.masks.by if section and section.masks else None,
        "pruning.layers": section.layers if section else None,
        "pruning.rounds": section.rounds if section and section.rounds > 1 else None,
    }
    fix = "leave it out, or use `distill-llm run`: this command only prunes"
    return [InputError(name, value, fix=fix) for name, value in given.items() if value is not None]
