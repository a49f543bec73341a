"""The door of `teacher.peers`: further students that read the same rows and give the same outputs as the student."""

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import Task, class_name_faults, label_names
from distill_llm.losses.terms.term import Use
from distill_llm.models.finding import OpenModel, check_head, open_model
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.peers import GIVES

FIELD = "teacher.peers"


def open_peers(recipe: Recipe, teacher: OpenModel, task: Task) -> tuple[OpenModel | None, ...]:
    """Open the peers that exist already; None stands for one that pruning makes.

    Raises:
        InputError: one has another tokenizer, vocabulary, head or other classes; or a loss needs what peers do not give.
    """
    section = recipe.teacher.peers
    if section is None or recipe.distillation is None:
        return ()
    raise_all(recipe.distillation.losses.faults(Use(teacher=GIVES), "distillation.losses"))
    given = enumerate(other.model for other in section.others)
    return tuple(None if name is None else _open(recipe, number, name, teacher, task) for number, name in given)


def _open(recipe: Recipe, number: int, name: str, teacher: OpenModel, task: Task) -> OpenModel:
    found = open_model(f"{FIELD}.others.{number}.model", name)
    if found.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(found.field, name, f"a model with the tokenizer of teacher.model ({teacher.name})")
    sizes = [model.config.get_text_config().vocab_size for model in (found, teacher)]
    if sizes[0] != sizes[1] and token_count(teacher.tokenizer) > min(sizes):
        accepted = f"a model with the vocabulary of teacher.model ({sizes[1]} entries)"
        raise InputError(found.field, f"{name} with {sizes[0]} entries", accepted)
    if task.kind.has_head(found.config.architectures):
        check_head(found, task)
        if not task.is_language_model:
            own = None if recipe.teacher.train is not None else label_names(teacher.config)
            raise_all(class_name_faults(label_names(found.config), own or task.label_names, found.field, name))
    return found
