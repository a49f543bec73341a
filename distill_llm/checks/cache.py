"""The door of `cache`: opens the teacher and reads the rows before any weights are loaded."""

from dataclasses import dataclass
from pathlib import Path

from distill_llm.checks.data import open_rows
from distill_llm.checks.faults import Collector
from distill_llm.checks.recipe import data_spec
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import TaskData
from distill_llm.losses.objective import Objective
from distill_llm.losses.terms.term import Use
from distill_llm.models.finding import OpenModel, check_head, open_model
from distill_llm.models.limits import length_faults, limits_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.cache import cache_gives
from distill_llm.teachers.cache_format import INDEX_NAME, CacheIndex, CacheSettings, read_index


@dataclass(frozen=True)
class CacheRequest:
    """What to cache, and the names of its fields in messages.

    Attributes:
        model: Hub id, folder, GGUF file or package:// path of the teacher.
        data: the task and its rows.
        folder: folder for the cache.
        settings: what to store; `classes` and `kind` are filled in later.
        model_field, folder_field: names for messages.
        objective: the losses that the cache must serve, if they are known.
        trust_remote_code: whether code that the teacher brings along may run.
    """

    model: str
    data: DataSpec
    folder: Path
    settings: CacheSettings
    model_field: str = "teacher"
    folder_field: str = "output_dir"
    objective: Objective | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class OpenCache:
    """What was opened for a cache.

    Attributes:
        teacher: the teacher's config and tokenizer.
        data: raw rows.
        classes: how many of the first logits are stored; None: all.
    """

    teacher: OpenModel
    data: TaskData
    classes: int | None


def request_of(recipe: Recipe, settings: CacheSettings) -> CacheRequest:
    """The cache that a recipe learns from.

    Raises:
        InputError: the recipe has no cache or no distillation, or names another dtype.
    """
    section, losses = recipe.teacher, recipe.distillation.losses if recipe.distillation else None
    if section.cache is None or losses is None:
        fix = f"{'set it, and ' if section.cache is None else ''}add a distillation section that learns from the cache"
        raise InputError("teacher.cache", section.cache, fix=fix)
    if settings.dtype is not None and section.dtype not in (None, settings.dtype):
        raise InputError(
            "dtype", settings.dtype, fix=f"leave it out, or set it to {section.dtype}, the recipe's teacher.dtype"
        )
    fields = {"model_field": "teacher.model", "folder_field": "teacher.cache"}
    return CacheRequest(
        section.model,
        data_spec(recipe),
        section.cache,
        settings,
        **fields,
        objective=losses,
        trust_remote_code=section.trust_remote_code,
    )


def open_cache(request: CacheRequest) -> OpenCache:
    """Open teacher and rows, and check that their outputs can be cached and learned from.

    Raises:
        InputError: one line per fault.
    """
    found = Collector()
    found.run(usable_output, request.folder, request.folder_field, INDEX_NAME)
    if (request.folder / INDEX_NAME).is_file():
        found.run(read_index, request.folder)  # refuses a folder that holds something else
    teacher = found.run(open_model, request.model_field, request.model, True, request.trust_remote_code)
    rows = found.run(lambda: open_rows(request.data, teacher.config if teacher else None))
    found.ask(_task_faults, rows)
    found.run(check_head, teacher, rows.task if rows else None)
    limits = limits_of(teacher.config, teacher.name) if teacher else None
    found.ask(length_faults, limits, request.data.max_length, "data.max_length")
    raise_all(found.faults)
    assert teacher is not None and rows is not None
    task = rows.task
    # A tokenizer may know tokens that the model has no embedding for (Gemma 3's images).
    classes = min(token_count(teacher.tokenizer), teacher.config.vocab_size) if task.is_language_model else None
    if request.objective is not None:
        held = cache_gives(CacheIndex(request.settings, classes or task.num_labels, {}, ()))
        raise_all(request.objective.faults(Use(teacher=held), "distillation.losses"))
    return OpenCache(teacher, rows, classes)


def _task_faults(rows: TaskData) -> list[InputError]:
    """A fault of a task whose inputs no cache can hold."""
    if not rows.task.kind.changes_inputs:
        return []
    fix = "choose another task: a cache holds one answer to a row, and here other words are masked in every epoch"
    return [InputError("data.task", rows.task.name, fix=fix)]
