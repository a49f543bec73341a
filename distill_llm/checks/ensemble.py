"""The door of `teacher.ensemble`: further teachers that read the same rows and give the same outputs as `teacher.model`."""

from collections.abc import Sequence
from dataclasses import replace

from distill_llm.common.errors import InputError, one_of, raise_all
from distill_llm.data.complete import numbered
from distill_llm.data.labelled import TEACHER_OF
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import Task, TaskData, class_order, label_names
from distill_llm.data.unlearnable import places_of
from distill_llm.losses.terms.term import Use
from distill_llm.models.finding import OpenModel, check_head, identity_of, open_model
from distill_llm.recipe.ensemble import EnsembleSection
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.by_row import BY_ROW
from distill_llm.teachers.cache_contents import Identity, MixtureIdentity, ServedIdentity
from distill_llm.teachers.ensemble import GIVES

FIELD = "teacher.ensemble"
COLUMN = f"data.columns.{TEACHER_OF}"


def open_others(recipe: Recipe, teacher: OpenModel, task: Task) -> tuple[OpenModel, ...]:
    """Open the further teachers of a recipe; none where it names none.

    Raises:
        InputError: one has another tokenizer, vocabulary or head, or other classes; or a loss needs what they do not give.
    """
    section = recipe.teacher.ensemble
    if section is None or recipe.distillation is None:
        return ()
    faults = recipe.distillation.losses.faults(Use(teacher=BY_ROW if section.by_row else GIVES), "distillation.losses")
    if section.confidence and not task.kind.has_distribution:
        fix = f"leave it out: the outputs of {task.name} are no probabilities"
        faults.append(InputError(f"{FIELD}.confidence", True, fix=fix))
    if section.learn_weights and section.average == "logits" and task.is_language_model:
        fix = "take probabilities: to learn weights of logits, those of all held-out tokens would have to be held"
        faults.append(InputError(f"{FIELD}.average", "logits", fix=fix))
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


def check_held_out(recipe: Recipe, data: TaskData) -> None:
    """Check that there are rows to learn weights on, where the recipe asks for that."""
    section = recipe.teacher.ensemble
    if section is not None and section.learn_weights and data.validation is None:
        fix = "set data.holdout_examples: the weights are learnt on rows that no student learns from"
        raise InputError(f"{FIELD}.learn_weights", True, fix=fix)


def check_names(recipe: Recipe, data: TaskData) -> None:
    """Check that a teacher teaches each raw training row, and that each teacher has rows, where the recipe names them by row.

    Raises:
        InputError: rows of a task that keeps no such column, or with names that no teacher has.
    """
    section, columns = recipe.teacher.ensemble, recipe.data.columns
    if section is None or not section.by_row or columns is None:
        return
    if TEACHER_OF not in data.train.column_names:
        fix = f"leave out `teaches` in {FIELD}: rows of the task {data.task.name} have no teacher of their own"
        raise InputError(COLUMN, columns.teacher_of, fix=fix)
    names, numbers = data.train[TEACHER_OF][:], section.numbers
    places = [place for place, name in enumerate(names) if name not in numbers]
    if places:
        unknown = names[places[0]]
        given = f"{unknown!r} in {numbered(places_of(data.train, places))} of the training rows"
        raise InputError(COLUMN, given, f"a name that a teacher `teaches`: {one_of(numbers, unknown)}")
    for number in sorted({*numbers.values()} - {numbers[name] for name in names}):
        taught = [name for name, each in numbers.items() if each == number]
        field = f"{FIELD}.others.{number - 1}.teaches" if number else f"{FIELD}.teaches"
        raise InputError(
            field, taught, fix=f"name rows that there are: none has this in its column {columns.teacher_of}"
        )


def identity(recipe: Recipe, teacher: OpenModel, others: Sequence[OpenModel]) -> Identity:
    """What tells a cache of the recipe's teachers from others."""
    section, models, server = recipe.teacher.ensemble, (teacher, *others), recipe.teacher.server
    if server is not None:
        return ServedIdentity(server.model or teacher.name)
    if section is None:
        return identity_of(teacher.path)
    how = section.model_dump(include={"average", "confidence", "learn_weights"})
    how |= {"numbers": section.numbers} if section.by_row else {"weights": section.weights}
    return MixtureIdentity(tuple(identity_of(model.path) for model in models), how)


def with_numbers(recipe: Recipe, data: TaskData) -> TaskData:
    """Encoded rows with the number of its teacher in each training row, where the recipe names teachers by row."""
    section = recipe.teacher.ensemble
    if section is None or not section.by_row:
        return data
    numbers, splits = section.numbers, {"validation": data.validation, "test": data.test}
    others = {
        name: rows.remove_columns(TEACHER_OF)
        for name, rows in splits.items()
        if rows is not None and TEACHER_OF in rows.column_names
    }
    named = [numbers[name] for name in data.train[TEACHER_OF]]
    train = data.train.remove_columns(TEACHER_OF).add_column(TEACHER_OF, named)  # type: ignore[call-arg]
    return replace(data, train=train, **others)
