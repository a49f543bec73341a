"""Writing a teacher cache: one pass of the teacher over a tokenized dataset, each different example once.

Examples are put in the order of their content hashes and cut into shards before the teacher runs. What a shard holds thus
depends neither on the order of the dataset, nor on which process writes it, nor on how often the writing was begun.
"""

import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.progress import progress_bar
from distill_llm.data.special_tokens import tokenizer_fingerprint
from distill_llm.losses.items import counted, valid_tokens
from distill_llm.models.fingerprints import teacher_fingerprint
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.cache_coding import ItemCoding, Tokens
from distill_llm.teachers.cache_contents import Examples, check_fingerprints, chosen_tokens, find_examples
from distill_llm.teachers.cache_format import INDEX_NAME, CacheIndex, CacheSettings, example_key, read_index
from distill_llm.teachers.cache_shards import map_shard, write_shard

Collator: TypeAlias = Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]]
SHARD_ITEMS = 1 << 20
CHUNK_ELEMENTS = 1 << 26  # logits that are coded at once: 256 MB in fp32
CPU_ELEMENTS = 1 << 19  # on the CPU: what its cache holds
SPARE = 1.1  # disk space asked for, over the estimate
PER_EXAMPLE = 40  # bytes of a shard for an example, besides its block


@dataclass(frozen=True)
class CacheSource:
    """What a cache is made from.

    Attributes:
        teacher: gives whole logits.
        dataset: tokenized; see `find_examples`.
        collator: makes a padded batch of rows of the dataset, left or right; it must not change the input ids.
        identity: the teacher's model or its folder; what the cache is later compared with.
        tokenizer: made the dataset; later compared like the teacher.
    """

    teacher: Teacher
    dataset: Dataset
    collator: Collator
    identity: PreTrainedModel | str | Path
    tokenizer: Any = None


@dataclass(frozen=True)
class Writing:
    """How a cache is written; nothing of this but `shard_items` shows in its files.

    Attributes:
        batch_size: examples per forward; examples of like length together.
        device: where the teacher runs.
        process_index, num_processes: this process writes every num_processes-th shard.
        shard_items: items per shard, at least: what a stop may lose.
        progress: show a bar.
    """

    batch_size: int = 8
    device: torch.device | str = "cpu"
    process_index: int = 0
    num_processes: int = 1
    shard_items: int = SHARD_ITEMS
    progress: bool = True


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
        "teacher": teacher_fingerprint(source.identity),
        "tokenizer": tokenizer_fingerprint(source.tokenizer),
        "data": examples.fingerprint,
    }
    known = read_index(folder) if (folder / INDEX_NAME).is_file() else None
    if known is not None:
        check_fingerprints(known, folder, fingerprints, settings)
    source.teacher.place(torch.device(writing.device))
    batches = _Batches(source, settings, writing, examples)
    classes, per_item = batches.measured()
    index = CacheIndex(settings, classes, fingerprints, tuple(_cut(examples.items, writing.shard_items)))
    if known is not None and known != index:
        accepted = "the number that this cache was begun with, or an empty folder"
        raise InputError("shard_items", writing.shard_items, accepted)
    folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(len(index.shards)) if not _is_whole(folder, index, number)]
    needed = sum(
        per_item * examples.items[span].sum() + PER_EXAMPLE * len(span) for span in _spans(index, missing).values()
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


def _spans(index: CacheIndex, shards: list[int]) -> dict[int, np.ndarray]:
    """By shard the places of its examples among all."""
    ends = np.cumsum([0, *(count for count, _ in index.shards)])
    return {number: np.arange(ends[number], ends[number + 1]) for number in shards}


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


@dataclass(frozen=True)
class _Batches:
    """Runs the teacher over chosen examples and codes its outputs."""

    source: CacheSource
    settings: CacheSettings
    writing: Writing
    examples: Examples

    @cached_property
    def dataset(self) -> Dataset:
        """Rows of plain lists."""
        return self.source.dataset.with_format(None)

    def measured(self) -> tuple[int, float]:
        """The number of classes, and the bytes of an item: of a batch of examples from all over the data."""
        examples = self.examples
        some = np.unique(np.linspace(0, len(examples.rows) - 1, self.writing.batch_size).astype(int))
        classes = self.logits(some[:1].tolist())[1].shape[1]
        return classes, sum(map(len, self.blocks(some).values())) / examples.items[some].sum()

    def write(self, folder: Path, index: CacheIndex, shards: list[int], title: str) -> None:
        """Write shards, one after the other."""
        spans, examples = _spans(index, shards), self.examples
        total = int(sum(examples.items[span].sum() for span in spans.values()))
        with progress_bar(total=total, desc=title, unit=" items", unit_scale=True, shown=self.writing.progress) as bar:
            for number, span in spans.items():
                blocks = self.blocks(span, bar.update)
                keys, counts = [examples.keys[at].tobytes() for at in span], examples.items[span].tolist()
                write_shard(index.shard_path(folder, number), index, keys, counts, [blocks[at] for at in span])

    def blocks(self, chosen: np.ndarray, advance: Callable[[int], Any] = int) -> dict[int, bytes]:
        """The block of each of the chosen examples by its place among all; `advance` is called with the items of each batch."""
        blocks: dict[int, bytes] = {}
        by_length = chosen[np.argsort(-self.examples.tokens[chosen], kind="stable")]
        for start in range(0, len(by_length), self.writing.batch_size):
            batch = by_length[start : start + self.writing.batch_size].tolist()
            bits, logits = self.logits(batch)
            blocks |= zip(batch, self._coded(batch, bits, logits), strict=True)
            advance(int(self.examples.items[batch].sum()))
        return blocks

    def logits(self, batch: list[int]) -> tuple[list[bytes], torch.Tensor]:
        """Per example the bits that mark its items, and the (items, classes) logits of all, one after the other."""
        rows = [self.dataset[int(self.examples.rows[at])] for at in batch]
        chosen = [chosen_tokens(row, self.settings)[1] for row in rows]
        inputs = {name: value.to(self.writing.device) for name, value in self.source.collator(rows).items()}
        kind, positions = self.settings.kind, None
        self._check_batch(inputs, batch, chosen)
        if kind != "example":
            positions = counted(inputs, kind, self.settings.unlabelled).flatten().nonzero().squeeze(-1)
        logits = self.source.teacher.signals(inputs, positions=positions).logits
        if logits.dim() != 2 or len(logits) != self.examples.items[batch].sum():
            accepted = "the kind of the teacher's outputs (losses.items.kind_of)"
            raise InputError("kind", f"{kind} with logits {list(logits.shape)}", accepted)
        logits = logits[:, : self.settings.classes]
        if not logits.amax(-1).isfinite().all():  # minus infinity is a class that the teacher masks
            raise InputError("teacher", "logits that are not finite", "a teacher with finite logits in its dtype")
        return [b"" if kind == "example" else np.packbits(own).tobytes() for own in chosen], logits

    def _check_batch(self, inputs: Mapping[str, torch.Tensor], batch: list[int], chosen: list[np.ndarray]) -> None:
        ids, valid = inputs["input_ids"].cpu().numpy(), valid_tokens(inputs).cpu().numpy()
        keys = [example_key(row[mask]) for row, mask in zip(ids, valid, strict=True)]
        if keys != [self.examples.keys[at].tobytes() for at in batch]:
            accepted = "a collator that only pads: inputs that change in every epoch cannot be stored"
            raise InputError("collator", "a collator that changes input_ids", accepted)
        if self.settings.kind != "example":
            marked = counted(inputs, self.settings.kind, self.settings.unlabelled).cpu().numpy()
            if not np.array_equal(marked[valid], np.concatenate(chosen)):
                accepted = "a collator that only pads labels (with -100), or labels in the dataset"
                raise InputError("collator", "a collator that changes which tokens have labels", accepted)

    def _coded(self, batch: list[int], bits: list[bytes], logits: torch.Tensor) -> Iterator[bytes]:
        counts, classes = self.examples.items[batch], logits.shape[1]
        if classes <= self.settings.k:
            parts = np.split(logits.float().cpu().numpy(), np.cumsum(counts)[:-1])
            yield from (zlib.compress(head + own.tobytes()) for head, own in zip(bits, parts, strict=True))
            return
        coding = ItemCoding(classes, self.settings.k, self.settings.method)
        points = np.concatenate([self._uniforms(at, count) for at, count in zip(batch, counts, strict=True)])
        step = max(1, (CPU_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS) // classes)
        chunks = [slice(start, start + step) for start in range(0, len(logits), step)]
        tokens = [coding.encode(logits[chunk], points[chunk]) for chunk in chunks]
        widths, scalars, gaps, numbers = (np.concatenate(each) for each in zip(*tokens, strict=True))
        ends = np.cumsum(counts)
        token_ends = np.cumsum(widths, dtype=np.int64)[ends - 1]
        by_item = [np.split(each, ends[:-1]) for each in (widths, scalars)]
        by_token = [np.split(each, token_ends[:-1]) for each in (gaps, numbers)]
        for head, *own in zip(bits, *by_item, *by_token, strict=True):
            yield zlib.compress(head + coding.join(Tokens(*own)))

    def _uniforms(self, at: int, count: int) -> np.ndarray:
        """The random numbers of an example depend on its content and the seed alone."""
        key = int.from_bytes(self.examples.keys[at].tobytes(), "little")
        return np.random.Generator(np.random.Philox(key=key, counter=self.settings.seed)).random(count)
