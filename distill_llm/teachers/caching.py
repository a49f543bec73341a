"""From a teacher and a task to a cache folder: what `distill-llm cache` does."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from distill_llm.checkpoint import load_pretrained
from distill_llm.data.encoding import LENGTH, collator, encode
from distill_llm.data.loading import load_task
from distill_llm.errors import InputError
from distill_llm.losses.items import kind_of
from distill_llm.opening import check_head, check_length, open_model
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.cache_format import CacheSettings
from distill_llm.teachers.cache_writer import write_cache
from distill_llm.teachers.online import OnlineTeacher


def cache_teacher(
    teacher: str,
    data: Mapping[str, Any],
    output_dir: str | Path,
    *,
    max_length: int = 128,
    k: int = 50,
    method: str = "sampled",
    batch_size: int = 8,
    dtype: str | None = None,
) -> tuple[int, int]:
    """Write the teacher's outputs on the training rows of a task, or go on where it was stopped.

    A recipe with this teacher and the same data section trains from the folder (`teacher.cache`), with no teacher in memory.
    Under `accelerate launch` the processes write a part each.

    Args:
        teacher: Hub id, folder, GGUF file or package:// path.
        data: arguments of `load_task`: task, path, train_examples, holdout_examples, seed, ...
        k, method: see `CacheSettings`.
        dtype: of the teacher's weights; None: bfloat16 on CUDA, else float32.

    Returns:
        The numbers of outputs and of bytes in the cache.

    Raises:
        InputError: one line, before the model's weights are loaded where it can be.
    """
    processes = PartialState()
    opened = open_model("teacher", teacher)
    settings = CacheSettings(k=k, method=method, seed=data.get("seed", 0))  # type: ignore[arg-type]
    with processes.main_process_first():
        rows = load_task(**data, config=opened.config)
        if rows.task.kind == "masked_lm":
            accepted = "a task whose inputs stay the same in every epoch: masked words change"
            raise InputError("task", rows.task.name, accepted)
        check_head(opened, rows.task)
        check_length(opened, "max_length", max_length)
        train = encode(rows, opened.tokenizer, max_length).train
    chosen = getattr(torch, dtype) if dtype else torch.bfloat16 if processes.device.type == "cuda" else torch.float32
    model = load_pretrained(opened.path, dtype=chosen)
    write_cache(
        output_dir,
        OnlineTeacher(model, processes.device),
        train,
        collator(rows.task, opened.tokenizer),
        CacheSettings(k=k, method=settings.method, kind=kind_of(model), seed=settings.seed),
        identity=identity_of(opened.path),
        tokenizer=opened.tokenizer,
        batch_size=batch_size,
        device=processes.device,
        process_index=processes.process_index,
        num_processes=processes.num_processes,
        progress=processes.is_main_process,
    )
    processes.wait_for_everyone()
    index = CachedTeacher(output_dir).index
    size = sum(index.shard_path(Path(output_dir), number).stat().st_size for number in range(len(index.shards)))
    return sum(count for _, count in index.shards), size


def cached_teacher(folder: str | Path, teacher: str, tokenizer: Any, train: Any) -> CachedTeacher:
    """The cache that `cache_teacher` wrote, refused unless it is of this teacher, tokenizer and these rows."""
    known = [name for name in train.column_names if name != LENGTH]
    return CachedTeacher(folder, identity_of(teacher), tokenizer, train.select_columns(known))


def identity_of(path: str) -> str:
    """The folder that a teacher is known by: a Hub id's is its snapshot in the local cache."""
    if Path(path).exists():
        return path
    from huggingface_hub import snapshot_download

    return snapshot_download(path, local_files_only=True)
