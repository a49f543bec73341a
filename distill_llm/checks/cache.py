"""The door of `cache`: opens the teacher and reads the rows before any weights are loaded."""

from dataclasses import dataclass
from pathlib import Path

from distill_llm.checks.data import open_rows
from distill_llm.checks.ensemble import check_held_out, check_names, open_others
from distill_llm.checks.faults import Collector
from distill_llm.checks.recipe import data_spec
from distill_llm.checks.server import check_served
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
from distill_llm.recipe.server import ServerSection
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
        recipe: that describes the cache, if one does.
        server: that runs the teacher; its name for the teacher is in it.
    """

    model: str
    data: DataSpec
    folder: Path
    settings: CacheSettings
    model_field: str = "teacher"
    folder_field: str = "output_dir"
    objective: Objective | None = None
    trust_remote_code: bool = False
    recipe: Recipe | None = None
    server: ServerSection | None = None


@dataclass(frozen=True)
class OpenCache:
    """What was opened for a cache.

    Attributes:
        teacher: the teacher's config and tokenizer.
        data: raw rows.
        classes: how many of the first logits are stored; None: all.
        others: the further teachers of an ensemble.
    """

    teacher: OpenModel
    data: TaskData
    classes: int | None
    others: tuple[OpenModel, ...] = ()


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
        recipe=recipe,
        server=section.server,
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
    if request.server is None:
        found.run(check_head, teacher, rows.task if rows else None)
    elif teacher is not None and rows is not None:
        found.run(_check_served, request, teacher, rows)
    recipe, others = request.recipe, tuple[OpenModel, ...]()
    if recipe is not None:
        others = found.run(open_others, recipe, teacher, rows.task if rows else None) or ()
        for check in (check_names, check_held_out):
            found.run(check, recipe, rows)
    for model in (teacher, *others):
        limits = limits_of(model.config, model.name) if model else None
        found.ask(length_faults, limits, request.data.max_length, "data.max_length")
    raise_all(found.faults)
    assert teacher is not None and rows is not None
    task = rows.task
    # A tokenizer may know tokens that the model has no embedding for (Gemma 3's images).
    classes = None
    if task.is_language_model:
        sizes = (model.config.get_text_config().vocab_size for model in (teacher, *others))
        classes = min(token_count(teacher.tokenizer), *sizes)
    if request.objective is not None:
        held = cache_gives(CacheIndex(request.settings, classes or task.num_labels, {}, ()))
        raise_all(request.objective.faults(Use(teacher=held), "distillation.losses"))
    return OpenCache(teacher, rows, classes, others)


def _check_served(request: CacheRequest, teacher: OpenModel, rows: TaskData) -> None:
    """Check the server, and that the cache is one of its likeliest tokens."""
    server, settings = request.server, request.settings
    assert server is not None
    if settings.method != "topk" or settings.k != server.k:
        given, fix = (
            f"{settings.method} with k={settings.k}",
            f"leave both out: a server gives its {server.k} likeliest tokens",
        )
        raise InputError("method" if settings.method != "topk" else "k", given, fix=fix)
    field = request.model_field.replace("model", "server") if "." in request.model_field else "server"
    check_served(server, teacher, rows.task, request.objective, field=field)


def _task_faults(rows: TaskData) -> list[InputError]:
    """A fault of a task whose inputs no cache can hold."""
    if not rows.task.kind.changes_inputs:
        return []
    fix = "choose another task: a cache holds one answer to a row, and here other words are masked in every epoch"
    return [InputError("data.task", rows.task.name, fix=fix)]
