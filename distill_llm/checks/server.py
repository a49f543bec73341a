"""The door of `teacher.server`: the endpoint answers, and gives what is asked of it."""

from dataclasses import replace

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import Task
from distill_llm.losses.objective import Objective
from distill_llm.losses.terms.term import Use
from distill_llm.models.endpoint import Client, Endpoint
from distill_llm.models.finding import OpenModel
from distill_llm.models.served_logprobs import Asking, ServedLogprobs
from distill_llm.recipe.recipe import Recipe
from distill_llm.recipe.server import ServerSection
from distill_llm.teachers.served import served_gives

FIELD = "teacher.server"
PROBE = "The server is asked for the log-probabilities of these words."


def endpoint_of(section: ServerSection, teacher: str, field: str = FIELD) -> tuple[Endpoint, Asking]:
    """Where a served teacher is, and what is asked of it; `teacher` is its name where the section has none."""
    how = section.model_dump(include={"url", "key_variable", "timeout", "retries", "parallel"})
    return Endpoint(**how, model=section.model or teacher, field=field), Asking(section.k, section.form)


def classes_of(teacher: OpenModel) -> int:
    """How many of the first logits count: those of the tokenizer's tokens that the model has."""
    return min(token_count(teacher.tokenizer), teacher.config.get_text_config().vocab_size)


def check_server(recipe: Recipe, teacher: OpenModel, task: Task) -> None:
    """Check that the server of a recipe gives what its losses need, unless a cache has that already.

    Raises:
        InputError: one line: a task or loss that a server cannot teach, no answer, or not the one that is asked for.
    """
    section = recipe.teacher.server
    if section is None or recipe.distillation is None:
        return
    check_served(section, teacher, task, recipe.distillation.losses, asks=recipe.teacher.cache is None)


def check_served(
    section: ServerSection,
    teacher: OpenModel,
    task: Task,
    losses: Objective | None,
    asks: bool = True,
    field: str = FIELD,
) -> None:
    """As `check_server`, of a section.

    Args:
        teacher: with the tokenizer.
        losses: that are to be served; None: not known.
        asks: whether the server is asked now.
        field: what messages call the section.
    """
    if task.kind.item != "next_token":
        fix = f"remove it: a server gives probabilities of the next token, and {task.name} is not about that"
        raise InputError(field, section.url, fix=fix)
    classes = classes_of(teacher)
    if section.k > classes:
        raise InputError(f"{field}.k", section.k, f"at most {classes}, all tokens")
    if losses is not None:
        raise_all(losses.faults(Use(teacher=served_gives(section.k, classes)), "distillation.losses"))
    if not asks:
        return
    endpoint, asking = endpoint_of(section, teacher.name, field)
    client = Client(replace(endpoint, retries=min(1, endpoint.retries)))
    client.check()
    ids = teacher.tokenizer(PROBE)["input_ids"]
    ServedLogprobs(client, teacher.tokenizer, asking, classes)([ids])
    client.close()
