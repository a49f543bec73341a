"""From a teacher and a task to a cache folder: what `distill-llm cache` does."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from distill_llm.checks.recipe import load_rows
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.outputs import usable_output
from distill_llm.common.processes import open_processes
from distill_llm.data.encoding import collator, encode
from distill_llm.data.loading import load_task
from distill_llm.data.padding import LENGTH
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import token_count
from distill_llm.data.tasks import Task, TaskData
from distill_llm.losses.items import kind_of
from distill_llm.losses.objective import Objective
from distill_llm.losses.terms.term import Gives, Use
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
from distill_llm.teachers.cache import CachedTeacher, cache_gives
from distill_llm.teachers.cache_format import INDEX_NAME, CacheIndex, CacheSettings, read_index
from distill_llm.teachers.cache_writer import CacheSource, Writing, write_cache
from distill_llm.teachers.online import OnlineTeacher


def cache_recipe(
    recipe: Recipe, *, k: int = 50, method: str = "sampled", batch_size: int = 8, dtype: str | None = None
) -> tuple[int, int]:
    """Write the outputs that a recipe's student learns from to the recipe's `teacher.cache`.

    Args:
        recipe: with `teacher.cache`.
        k, method, batch_size, dtype: as of `cache_teacher`; dtype None: the recipe's `teacher.dtype`, where it has one.

    Returns, raises:
        As `cache_teacher`; also an InputError for losses that need more than such a cache holds, and for a `dtype` that
        contradicts the recipe.
    """
    section, losses = recipe.teacher, recipe.distillation.losses if recipe.distillation else None
    if section.cache is None or losses is None:
        raise InputError("teacher.cache", section.cache, "a folder, in a recipe with a distillation section")
    raise_all(losses.faults(Use(teacher=Gives("a cached teacher", new_text=False)), "distillation.losses"))
    usable_output(section.cache, "teacher.cache", INDEX_NAME)
    opened = open_model("teacher.model", section.model)
    settings = CacheSettings(k=k, method=method, seed=recipe.seed)  # type: ignore[arg-type]
    length = ("data.max_length", recipe.data.max_length)
    if dtype is not None and section.dtype not in (None, dtype):
        raise InputError("dtype", dtype, fix=f"leave it out, or give the recipe's teacher.dtype, {section.dtype}")
    dtype = dtype or section.dtype
    return _Job(
        opened, lambda: load_rows(recipe, opened), section.cache, length, settings, batch_size, dtype, losses
    ).write()


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
    Under `accelerate launch` each process writes a part. Of a language model, the logits of the tokenizer's tokens are
    stored; the padding of the vocabulary is left out.

    Args:
        teacher: Hub id, folder, GGUF file or package:// path.
        data: the task, its rows and their length.
        k, method: see `CacheSettings`.
        dtype: of the teacher's weights; None: bfloat16 on CUDA, else float32. A cache has one: to go on with it on another
            kind of device, give it.

    Returns:
        The numbers of outputs and of bytes in the cache.

    Raises:
        InputError: one line; where possible before the model's weights are loaded.
    """
    usable_output(Path(output_dir), begun=INDEX_NAME)
    opened = open_model("teacher", teacher)
    settings = CacheSettings(k=k, method=method, seed=data.seed)  # type: ignore[arg-type]
    length = ("max_length", data.max_length)

    def load() -> TaskData:
        return load_task(data, opened.config)

    return _Job(opened, load, Path(output_dir), length, settings, batch_size, dtype).write()


@dataclass(frozen=True)
class _Job:
    """A cache to be written.

    Attributes:
        opened: the teacher.
        load: reads the rows of its task.
        length: the field that says how many tokens a row has at most, and its value.
        dtype: of the teacher's weights; None: by the device.
        objective: what is to be learned from the cache, where that is known.
    """

    opened: OpenModel
    load: Callable[[], TaskData]
    folder: Path
    length: tuple[str, int]
    settings: CacheSettings
    batch_size: int
    dtype: str | None
    objective: Objective | None = None

    def write(self) -> tuple[int, int]:
        """The numbers of outputs and of bytes in the cache, once all processes have written their parts."""
        if (self.folder / INDEX_NAME).is_file():
            read_index(self.folder)  # refuses the index of something else
        processes, opened = open_processes(), self.opened
        dtype = chosen_dtype(self.dtype, processes.device)
        with processes.main_process_first():
            task, train = self._rows()
        # A tokenizer may know tokens that the model has no embedding for (Gemma 3's images).
        cut = min(token_count(opened.tokenizer), opened.config.vocab_size) if task.is_language_model else None
        if self.objective is not None:
            held = cache_gives(CacheIndex(self.settings, cut or task.num_labels, {}, ()))
            raise_all(self.objective.faults(Use(teacher=held), "distillation.losses"))
        model = load_pretrained(opened.path, dtype=getattr(torch, dtype))
        source = CacheSource(
            OnlineTeacher(model),
            train,
            collator(task, opened.tokenizer),
            identity=identity_of(opened.path),
            tokenizer=opened.tokenizer,
        )
        writing = Writing(
            self.batch_size,
            processes.device,
            processes.process_index,
            processes.num_processes,
            progress=processes.is_main_process,
        )
        settings = replace(self.settings, kind=kind_of(model), classes=cut, dtype=dtype)
        write_cache(self.folder, source, settings, writing)
        processes.wait_for_everyone()
        index = CachedTeacher(self.folder).index
        size = sum(index.shard_path(self.folder, number).stat().st_size for number in range(len(index.shards)))
        return sum(count for _, count in index.shards), size

    def _rows(self) -> tuple[Task, Dataset]:
        """The task, and its training rows as tokens."""
        rows, opened = self.load(), self.opened
        if rows.task.kind.changes_inputs:
            accepted = "a task whose inputs stay the same in every epoch: masked words change"
            raise InputError("task", rows.task.name, accepted)
        check_head(opened, rows.task)
        raise_all(length_faults(limits_of(opened.config, opened.name), self.length[1], self.length[0]))
        return rows.task, check_tokens(encode(rows, opened.tokenizer, self.length[1]), opened).train


def cached_teacher(folder: str | Path, teacher: str, tokenizer: Any, train: Any) -> CachedTeacher:
    """The cache that `cache_teacher` wrote, refused unless it is of this teacher, tokenizer and these rows."""
    known = [name for name in train.column_names if name != LENGTH]
    return CachedTeacher(folder, identity_of(teacher), tokenizer, train.select_columns(known))
