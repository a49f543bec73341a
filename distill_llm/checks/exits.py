"""The door of `exits`: the student's family and head, its layers, and a classifier's rows to choose a threshold on."""

import copy
from typing import Any

from distill_llm.common.errors import InputError
from distill_llm.data.tasks import Task
from distill_llm.losses.terms.term import Use
from distill_llm.models.exits import exit_faults
from distill_llm.models.finding import OpenModel
from distill_llm.recipe.recipe import Recipe


def exit_recipe_faults(recipe: Recipe, student: OpenModel, task: Task) -> list[InputError]:
    """What exits do not go with.

    Args:
        student: the one that the recipe names, else the teacher that it is cut from.
    """
    section, pruning = recipe.exits, recipe.pruning
    if section is None or recipe.distillation is None:
        return []
    use = Use(kind=task.kind.item, single_output=not task.kind.has_distribution)
    faults = recipe.distillation.losses.only(["exits"]).faults(use, "distillation.losses")
    if faults:
        return faults
    config: Any = copy.copy(student.config)
    config.num_labels, config.problem_type = task.num_labels, task.kind.problem_type
    if pruning is not None and pruning.layers is not None:
        config.num_hidden_layers = len(pruning.layers)
    name = next((name for name in config.architectures or () if task.kind.has_head([name])), "")
    faults = exit_faults(config, name or f"{config.model_type}{task.kind.head_classes[0]}", section.after, "exits")
    if pruning is not None and pruning.keep is not None and "layers" in pruning.units:
        fix = "remove layers from it, or name the layers that stay (pruning.layers): exits are counted in those"
        faults.append(InputError("pruning.units", list(pruning.units), fix=fix))
    if task.is_language_model:
        fix = "leave it out: a language model has no threshold, its exits draft and all layers check"
        given = {name: getattr(section, name) for name in ("threshold", "within")}
        defaults = {name: type(section).model_fields[name].default for name in given}
        return faults + [
            InputError(f"exits.{name}", value, fix=fix) for name, value in given.items() if value != defaults[name]
        ]
    if section.threshold == "auto" and not recipe.data.holdout_examples:
        fix = "set data.holdout_examples, for rows to choose it on, or set it to a number such as 0.9"
        faults.append(InputError("exits.threshold", "auto", fix=fix))
    return faults
