"""From a teacher and a task to a cache folder: what `distill-llm cache` does."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from distill_llm.checks.recipe import load_rows
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.common.processes import open_processes
from distill_llm.data.encoding import collator, encode
from distill_llm.data.loading import load_task
from distill_llm.data.padding import LENGTH
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import TaskData
from distill_llm.losses.items import kind_of
from distill_llm.losses.objective import Objective
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.finding import (
    OpenModel,
    check_head,
    check_tokens,
    chosen_dtype,
    identity_of,
    open_model,
)
from distill_llm.models.limits import length_faults, limits_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.cache import CachedTeacher, check_objective
from distill_llm.teachers.cache_format import INDEX_NAME, CacheIndex, CacheSettings, read_index
from distill_llm.teachers.cache_writer import write_cache
from distill_llm.teachers.online import OnlineTeacher


def cache_recipe(
    recipe: Recipe, *, k: int = 50, method: str = "sampled", batch_size: int = 8, dtype: str | None = None
) -> tuple[int, int]:
    """Write the outputs that a recipe learns from, its teacher's on its rows, to its `teacher.cache`.

    Args:
        recipe: with `teacher.cache`.
        k, method, batch_size, dtype: as of `cache_teacher`; dtype None: the recipe's `teacher.dtype`, where it has one,
            which another must not contradict.

    Returns, raises:
        As `cache_teacher`; an InputError for losses that no such cache serves, too.
    """
    section, losses = recipe.teacher, recipe.distillation.losses if recipe.distillation else None
    if section.cache is None or losses is None:
        raise InputError("teacher.cache", section.cache, "a folder, in a recipe with a distillation section")
    if losses.responses is not None:
        accepted = "nothing with teacher.cache: the teacher never saw the student's answers"
        raise InputError("distillation.losses.responses", "a cached teacher", accepted)
    usable_output(section.cache, "teacher.cache", INDEX_NAME)
    opened = open_model("teacher.model", section.model)
    settings = CacheSettings(k=k, method=method, seed=recipe.seed)  # type: ignore[arg-type]
    length = ("data.max_length", recipe.data.max_length)
    if dtype is not None and section.dtype not in (None, dtype):
        raise InputError("dtype", dtype, f"{section.dtype}, the recipe's teacher.dtype, or nothing")
    dtype = dtype or section.dtype
    return _write(opened, lambda: load_rows(recipe, opened), section.cache, length, settings, batch_size, dtype, losses)


def cache_teacher(
    teacher: str,
    data: DataSpec,
    output_dir: str | Path,
    *,
    k: int = 50,
    method: str = "sampled",
    batch_size: int = 8,
    dtype: str | None = None,
) -> tuple[int, int]:
    """Write the teacher's outputs on the training rows of a task, or go on where it was stopped.

    A recipe with this teacher and the same data section trains from the folder (`teacher.cache`), with no teacher in memory.
    Under `accelerate launch` the processes write a part each. Of a language model, the logits of the tokenizer's tokens
    are stored, without what the vocabulary is padded with.

    Args:
        teacher: Hub id, folder, GGUF file or package:// path.
        data: the task, its rows and their length.
        k, method: see `CacheSettings`.
        dtype: of the teacher's weights; None: bfloat16 on CUDA, else float32. A cache is of one: where it is gone on with on
            another kind of device, say which.

    Returns:
        The numbers of outputs and of bytes in the cache.

    Raises:
        InputError: one line, before the model's weights are loaded where it can be.
    """
    usable_output(Path(output_dir), begun=INDEX_NAME)
    opened = open_model("teacher", teacher)
    settings = CacheSettings(k=k, method=method, seed=data.seed)  # type: ignore[arg-type]
    length = ("max_length", data.max_length)

    def load() -> TaskData:
        return load_task(data, opened.config)

    return _write(opened, load, Path(output_dir), length, settings, batch_size, dtype)


def _write(
    opened: OpenModel,
    load: Callable[[], TaskData],
    folder: Path,
    length: tuple[str, int],
    settings: CacheSettings,
    batch_size: int,
    dtype: str | None,
    objective: Objective | None = None,
) -> tuple[int, int]:
    """The work of both; `length` is the most tokens of a row and the field that says so."""
    if (folder / INDEX_NAME).is_file():
        read_index(folder)  # of a cache, or of something else
    processes = open_processes()
    chosen = chosen_dtype(dtype, processes.device)
    with processes.main_process_first():
        rows = load()
        if rows.task.kind.changes_inputs:
            accepted = "a task whose inputs stay the same in every epoch: masked words change"
            raise InputError("task", rows.task.name, accepted)
        check_head(opened, rows.task)
        raise_all(length_faults(limits_of(opened.config, opened.name), length[1], length[0]))
        train = check_tokens(encode(rows, opened.tokenizer, length[1]), opened).train
    # A tokenizer may know tokens that the model has no embedding for (Gemma 3's images).
    cut = min(token_count(opened.tokenizer), opened.config.vocab_size) if rows.task.is_language_model else None
    if objective is not None:
        try:
            check_objective(objective, CacheIndex(settings, cut or rows.task.num_labels, {}, ()))
        except InputError as error:
            raise error.renamed(f"distillation.{error.field}") from None
    model = load_pretrained(opened.path, dtype=getattr(torch, chosen))
    write_cache(
        folder,
        OnlineTeacher(model, processes.device),
        train,
        collator(rows.task, opened.tokenizer),
        replace(settings, kind=kind_of(model), classes=cut, dtype=chosen),
        identity=identity_of(opened.path),
        tokenizer=opened.tokenizer,
        batch_size=batch_size,
        device=processes.device,
        process_index=processes.process_index,
        num_processes=processes.num_processes,
        progress=processes.is_main_process,
    )
    processes.wait_for_everyone()
    index = CachedTeacher(folder).index
    size = sum(index.shard_path(folder, number).stat().st_size for number in range(len(index.shards)))
    return sum(count for _, count in index.shards), size


def cached_teacher(folder: str | Path, teacher: str, tokenizer: Any, train: Any) -> CachedTeacher:
    """The cache that `cache_teacher` wrote, refused unless it is of this teacher, tokenizer and these rows."""
    known = [name for name in train.column_names if name != LENGTH]
    return CachedTeacher(folder, identity_of(teacher), tokenizer, train.select_columns(known))
