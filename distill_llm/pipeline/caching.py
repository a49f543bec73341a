"""Writing a teacher cache, as `distill-llm cache` does it."""

from dataclasses import replace
from pathlib import Path

import torch

from distill_llm.checks.cache import CacheRequest, OpenCache, open_cache, request_of
from distill_llm.common.locks import alone_in
from distill_llm.common.processes import open_processes
from distill_llm.data.encoding import collator, encode
from distill_llm.data.spec import DataSpec
from distill_llm.losses.items import kind_of
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.finding import check_tokens, chosen_dtype, identity_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.teachers.cache_writer import CacheSource, Writing, write_cache
from distill_llm.teachers.online import OnlineTeacher


def cache_recipe(recipe: Recipe, settings: CacheSettings | None = None, batch_size: int = 8) -> tuple[int, int]:
    """Write the outputs of a recipe's teacher on its training rows to the recipe's `teacher.cache`.

    Args:
        recipe: a recipe with `teacher.cache`.
        settings, batch_size: as for `cache_teacher`. If the recipe has a `teacher.dtype`, the dtype must be that one or None.

    Returns, raises:
        As `cache_teacher`. Also raises InputError if the cache could not serve the recipe's losses.
    """
    settings = settings or CacheSettings()
    request = request_of(recipe, settings)
    return _write(
        replace(request, settings=replace(settings, dtype=settings.dtype or recipe.teacher.dtype)), batch_size
    )


def cache_teacher(
    teacher: str,
    data: DataSpec,
    output_dir: str | Path,
    settings: CacheSettings | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
) -> tuple[int, int]:
    """Write the teacher's outputs on the training rows of a task, or continue after a stop.

    A recipe with this teacher and the same data section trains from the folder (`teacher.cache`), with no teacher in memory.
    Under `accelerate launch` each process writes a part. For a language model, logits are stored of the tokenizer's tokens, but
    not of the padding of the vocabulary.

    Args:
        teacher: Hub id, folder, GGUF file or package:// path.
        data: the task, its rows and their length; and the seed, which the draws of a cache use too.
        output_dir: folder for the cache.
        settings: k, method and the dtype of the teacher's weights (None: bfloat16 on CUDA, else float32). A cache has one
            dtype: give it to continue the cache on another kind of device.
        batch_size: number of examples at once.
        trust_remote_code: run the code that the teacher brings along, if it does.

    Returns:
        The numbers of outputs and of bytes in the cache.

    Raises:
        InputError: one line, if possible before the model's weights are loaded.
    """
    request = CacheRequest(
        teacher, data, Path(output_dir), settings or CacheSettings(), trust_remote_code=trust_remote_code
    )
    return _write(request, batch_size)


def _write(request: CacheRequest, batch_size: int) -> tuple[int, int]:
    opened = open_cache(request)
    with alone_in(request.folder, request.folder_field):
        return _write_alone(request, opened, batch_size)


def _write_alone(request: CacheRequest, opened: OpenCache, batch_size: int) -> tuple[int, int]:
    """The numbers of outputs and of bytes in the cache, once all processes have written their parts."""
    processes, folder = open_processes(), request.folder
    teacher, task = opened.teacher, opened.data.task
    dtype = chosen_dtype(request.settings.dtype, processes.device)
    with processes.main_process_first():
        rows = encode(opened.data, teacher.tokenizer, request.data.max_length)
        train = check_tokens(rows, teacher, "data.path").train
    model = load_pretrained(teacher.path, teacher.trust_remote_code, dtype=getattr(torch, dtype))
    source = CacheSource(
        OnlineTeacher(model),
        train,
        collator(task, teacher.tokenizer),
        identity=identity_of(teacher.path),
        tokenizer=teacher.tokenizer,
    )
    seed, classes = request.data.seed, opened.classes
    settings = replace(request.settings, kind=kind_of(model), classes=classes, dtype=dtype, seed=seed)
    writing = Writing(
        batch_size,
        processes.device,
        processes.process_index,
        processes.num_processes,
        progress=processes.is_main_process,
    )
    write_cache(folder, source, settings, writing)
    processes.wait_for_everyone()
    index = CachedTeacher(folder).index
    size = sum(index.shard_path(folder, number).stat().st_size for number in range(len(index.shards)))
    return sum(count for _, count in index.shards), size
