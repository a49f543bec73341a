"""Writing a teacher cache: one pass of the teacher over a tokenized dataset, each different example once.

Examples are put in the order of their content hashes and cut into shards before the teacher runs. What a shard holds thus
depends neither on the order of the dataset, nor on which process writes it, nor on how often the writing was begun.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.data.special_tokens import tokenizer_fingerprint
from distill_llm.teachers.cache_batches import Batches, CacheSource, Writing, spans_of
from distill_llm.teachers.cache_contents import (
    check_fingerprints,
    find_examples,
    identity_fingerprint,
)
from distill_llm.teachers.cache_format import INDEX_NAME, CacheIndex, CacheSettings, read_index
from distill_llm.teachers.cache_shards import map_shard

SPARE = 1.1  # disk space asked for, over the estimate
PER_EXAMPLE = 40  # bytes of a shard for an example, besides its block


def write_cache(
    path: str | Path, source: CacheSource, settings: CacheSettings, writing: Writing | None = None
) -> CacheIndex:
    """Write a teacher's signals of every item of a dataset, or go on with it where it was stopped.

    Shards appear whole, one after the other; the same call makes those that are missing. With a teacher that gives the
    same logits each time, the finished folder is the same byte for byte however often it was stopped and however many
    processes wrote it. A first batch tells how much space is needed.

    Args:
        path: the folder.
        source: the teacher, which is placed on the device, and its data.
        settings: what to store.
        writing: by default one process on the CPU.

    Returns:
        The index of the whole cache; its shards may not all be there yet where several processes write.

    Raises:
        InputError: one line: what changed since a cache in this folder was begun, a disk too small, logits that are
            not finite, a collator that changes the examples.
    """
    folder, writing = Path(path), writing or Writing()
    examples = find_examples(source.dataset, settings)
    fingerprints = {
        "teacher": identity_fingerprint(source.identity),
        "tokenizer": tokenizer_fingerprint(source.tokenizer),
        "data": examples.fingerprint,
    }
    known = read_index(folder) if (folder / INDEX_NAME).is_file() else None
    if known is not None:
        check_fingerprints(known, folder, fingerprints, settings)
    source.teacher.place(torch.device(writing.device))
    batches = Batches(source, settings, writing, examples)
    classes, per_item = batches.measured()
    shards = tuple(_cut(examples.items, writing.shard_items))
    index = CacheIndex(settings, classes, fingerprints, shards, source.weights)
    if known is not None and known != index:
        accepted = "the number that this cache was begun with, or an empty folder"
        raise InputError("shard_items", writing.shard_items, accepted)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(len(index.shards)) if not _is_whole(folder, index, number)]
    needed = sum(
        per_item * examples.items[span].sum() + PER_EXAMPLE * len(span) for span in spans_of(index, missing).values()
    )
    if needed * SPARE > (free := shutil.disk_usage(folder).free):
        raise InputError(
            "path",
            f"{folder} with {_size(free)} free",
            fix=f"free some space, or choose another disk: {_size(needed * SPARE)} are needed",
        )
    if known is None:
        with written_whole(folder / INDEX_NAME) as partial:
            partial.write_text(index.to_json())
    own = [number for number in missing if number % writing.num_processes == writing.process_index]
    batches.write(folder, index, own, f"teacher cache, {per_item:.0f} bytes an item, {_size(needed)} to write")
    if own and all(index.shard_path(folder, number).is_file() for number in missing):
        for partial in folder.glob("*.partial"):
            partial.unlink(missing_ok=True)
    return index


def _cut(items: np.ndarray, shard_items: int) -> Iterator[tuple[int, int]]:
    """(examples, items) of shards of at least `shard_items`."""
    examples = count = 0
    for number in items.tolist():
        examples, count = examples + 1, count + number
        if count >= shard_items:
            yield examples, count
            examples = count = 0
    if examples:
        yield examples, count


def _is_whole(folder: Path, index: CacheIndex, number: int) -> bool:
    try:
        map_shard(folder, index, number)
    except InputError:
        return False
    return True


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
