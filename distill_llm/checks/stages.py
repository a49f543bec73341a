"""The door of `teacher.checkpoints`: weights that fit in the place of the teacher's."""

from distill_llm.checks.models import skeleton
from distill_llm.common.errors import InputError
from distill_llm.data.tasks import Task, class_order, label_names
from distill_llm.models.finding import OpenModel, check_head, open_model
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.checkpoints import check_shapes

FIELD = "teacher.checkpoints"


def open_stages(recipe: Recipe, teacher: OpenModel, task: Task) -> tuple[OpenModel, ...]:
    """Open the checkpoints that a recipe names, in the order in which they teach; none where the run makes them.

    Raises:
        InputError: one has another tokenizer, other sizes than the teacher, or another head or other classes than the task.
    """
    given = recipe.teacher.checkpoints
    if not isinstance(given, dict):
        return ()
    own = skeleton(teacher).state_dict()
    return tuple(_open(f"{FIELD}.{start}", name, own, teacher, task) for start, name in given.items())


def _open(field: str, name: str, own: dict, teacher: OpenModel, task: Task) -> OpenModel:
    found = open_model(field, name, True, teacher.trust_remote_code)
    if found.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise InputError(field, name, f"a checkpoint with the tokenizer of teacher.model ({teacher.name})")
    check_shapes(own, skeleton(found).state_dict(), field, name)
    check_head(found, task)
    names = None if task.is_language_model else label_names(found.config)
    if names and task.label_names and class_order(names, task.label_names, field, name) is not None:
        raise InputError(field, f"{name} with labels {list(names)}", f"labels {list(task.label_names)}, in this order")
    return found
