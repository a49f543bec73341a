"""The door of `teacher.ensemble`: further teachers that read the same rows and give the same outputs as `teacher.model`."""

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import Task, class_order, label_names
from distill_llm.losses.terms.term import Use
from distill_llm.models.finding import OpenModel, check_head, open_model
from distill_llm.recipe.ensemble import EnsembleSection
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.ensemble import GIVES

FIELD = "teacher.ensemble"


def open_others(recipe: Recipe, teacher: OpenModel, task: Task) -> tuple[OpenModel, ...]:
    """Open the further teachers of a recipe; none where it names none.

    Raises:
        InputError: one has another tokenizer, vocabulary or head, or other classes; or a loss needs what they do not give.
    """
    section = recipe.teacher.ensemble
    if section is None or recipe.distillation is None:
        return ()
    faults = recipe.distillation.losses.faults(Use(teacher=GIVES), "distillation.losses")
    if section.confidence and not task.kind.has_distribution:
        fix = f"leave it out: the outputs of {task.name} are no probabilities"
        faults.append(InputError(f"{FIELD}.confidence", True, fix=fix))
    raise_all(faults)
    return tuple(_open_member(recipe, section, number, teacher, task) for number in range(len(section.others)))


def assistant_faults(recipe: Recipe) -> list[InputError]:
    """Faults of losses that a teacher and its assistant together have no signals for."""
    asked = recipe.teacher.assistant
    if asked is None or asked.share == 1 or recipe.distillation is None:
        return []
    return recipe.distillation.losses.faults(Use(teacher=GIVES), "distillation.losses")


def _open_member(recipe: Recipe, section: EnsembleSection, number: int, teacher: OpenModel, task: Task) -> OpenModel:
    name = section.others[number].model
    found = open_model(f"{FIELD}.others.{number}.model", name)
    if found.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(found.field, name, f"a model with the tokenizer of teacher.model ({teacher.name})")
    sizes = [model.config.get_text_config().vocab_size for model in (found, teacher)]
    if sizes[0] != sizes[1] and token_count(teacher.tokenizer) > min(sizes):
        accepted = f"a model with the vocabulary of teacher.model ({sizes[1]} entries)"
        raise InputError(found.field, f"{name} with {sizes[0]} entries", accepted)
    check_head(found, task, any_order=True)
    if not task.is_language_model:
        own = None if recipe.teacher.train is not None else label_names(teacher.config)
        class_order(label_names(found.config), own or task.label_names, found.field, name)
    return found
