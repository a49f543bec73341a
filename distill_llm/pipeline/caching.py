"""Writing a teacher cache, as `distill-llm cache` does it."""

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from distill_llm.checks.cache import CacheRequest, OpenCache, open_cache, request_of
from distill_llm.checks.ensemble import identity, with_numbers
from distill_llm.checks.server import endpoint_of
from distill_llm.common.locks import alone_in
from distill_llm.common.processes import open_processes
from distill_llm.data.encoding import collator, encode
from distill_llm.data.spec import DataSpec
from distill_llm.losses.items import kind_of
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.finding import check_tokens, chosen_dtype, identity_of
from distill_llm.pipeline.teaching import HeldOutRows, learn, several, trusted
from distill_llm.recipe.recipe import Recipe
from distill_llm.recipe.server import ServerSection
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.cache_contents import Identity, ServedIdentity
from distill_llm.teachers.cache_format import INDEX_NAME, CacheSettings, read_index
from distill_llm.teachers.cache_writer import CacheSource, Writing, write_cache
from distill_llm.teachers.online import OnlineTeacher
from distill_llm.teachers.served import ServedTeacher
from distill_llm.teachers.several import Several


def cache_recipe(recipe: Recipe, settings: CacheSettings | None = None, batch_size: int = 8) -> tuple[int, int]:
    """Write the outputs of a recipe's teacher on its training rows to the recipe's `teacher.cache`.

    Args:
        recipe: a recipe with `teacher.cache`.
        settings, batch_size: as for `cache_teacher`. If the recipe has a `teacher.dtype`, the dtype must be that one or None.

    Returns, raises:
        As `cache_teacher`. Also raises InputError if the cache could not serve the recipe's losses.
    """
    settings = settings or default_settings(recipe.teacher.server)
    request = request_of(recipe, settings)
    return _write(
        replace(request, settings=replace(settings, dtype=settings.dtype or recipe.teacher.dtype)), batch_size
    )


def default_settings(server: ServerSection | None) -> CacheSettings:
    """What is stored where nothing else is asked for: of a served teacher what it gives."""
    return CacheSettings() if server is None else CacheSettings(k=server.k, method="topk")


def cache_teacher(
    teacher: str,
    data: DataSpec,
    output_dir: str | Path,
    settings: CacheSettings | None = None,
    batch_size: int = 8,
    trust_remote_code: bool = False,
    server: ServerSection | None = None,
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
        server: that runs the teacher, of which only the tokenizer and the config are read here.

    Returns:
        The numbers of outputs and of bytes in the cache.

    Raises:
        InputError: one line, if possible before the model's weights are loaded.
    """
    settings = settings or default_settings(server)
    request = CacheRequest(
        teacher, data, Path(output_dir), settings, trust_remote_code=trust_remote_code, server=server
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
        rows = rows if request.recipe is None else with_numbers(request.recipe, rows)
        train = check_tokens(rows, teacher, "data.path").train
    pad = collator(task, teacher.tokenizer)
    found, weights = _teachers(request, opened, dtype, HeldOutRows(rows.validation, pad, batch_size, processes.device))
    source = CacheSource(found, train, pad, _identity(request, opened), teacher.tokenizer, weights)
    seed, classes = request.data.seed, opened.classes
    kind = kind_of(found.readers[0]) if found.readers else task.kind.item
    settings = replace(request.settings, kind=kind, classes=classes, seed=seed)
    settings = replace(settings, dtype=None if request.server is not None else dtype)
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


def _identity(request: CacheRequest, opened: OpenCache) -> Identity:
    if request.server is not None:
        return ServedIdentity(request.server.model or opened.teacher.name)
    if request.recipe is None:
        return identity_of(opened.teacher.path)
    return identity(request.recipe, opened.teacher, opened.others)


def _teachers(
    request: CacheRequest, opened: OpenCache, dtype: str, held: HeldOutRows
) -> tuple[Teacher, tuple[float, ...] | None]:
    """The teacher, or the several of a recipe; and their weights where those are learnt, now or by an earlier start."""

    def load(path: str | Path, code: bool) -> PreTrainedModel:
        return load_pretrained(path, code, dtype=getattr(torch, dtype))

    first, ensemble = opened.teacher, request.recipe.teacher.ensemble if request.recipe is not None else None
    if request.server is not None:
        endpoint, asking = endpoint_of(request.server, first.name)
        return ServedTeacher(endpoint, first.tokenizer, asking, opened.classes), None
    if ensemble is None:
        return OnlineTeacher(load(first.path, first.trust_remote_code)), None
    waiting, weights = request.folder.with_name(f"{request.folder.name}-teachers"), None
    paths = [(first.path, first.trust_remote_code), *trusted(opened.others)]
    held = replace(held, tokenizer=first.tokenizer, names=opened.data.task.label_names)
    if ensemble.learn_weights:
        known = read_index(request.folder).weights if (request.folder / INDEX_NAME).is_file() else None
        weights = known or learn(ensemble, paths, load, held, waiting).weights
    found = several(ensemble, paths, load, weights, waiting)
    if isinstance(found, PreTrainedModel):
        return OnlineTeacher(found), weights
    if isinstance(found, Several):
        found.agree(first.tokenizer, held.names)
    return found, weights
