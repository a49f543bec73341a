"""What a cache's blocks are made from: batches of the different examples, read by the teacher and coded."""

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.common.progress import progress_bar
from distill_llm.losses.items import counted, valid_tokens
from distill_llm.losses.signals import SparseSignals
from distill_llm.losses.sparse import SparseTargets
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.cache_coding import ItemCoding, Tokens
from distill_llm.teachers.cache_contents import (
    Examples,
    Identity,
    chosen_tokens,
)
from distill_llm.teachers.cache_format import CacheIndex, CacheSettings, example_key
from distill_llm.teachers.cache_shards import write_shard

Collator: TypeAlias = Callable[[list[dict[str, Any]]], Mapping[str, torch.Tensor]]
SHARD_ITEMS = 1 << 20
CHUNK_ELEMENTS = 1 << 26  # logits that are coded at once: 256 MB in fp32
CPU_ELEMENTS = 1 << 19  # on the CPU: what its cache holds


@dataclass(frozen=True)
class CacheSource:
    """What a cache is made from.

    Attributes:
        teacher: gives whole logits, or a few tokens of each item (SparseSignals), which a `topk` cache holds.
        dataset: tokenized; see `find_examples`.
        collator: makes a padded batch of rows of the dataset, left or right; it must not change the input ids.
        identity: the teacher's model or its folder, or those of several; what the cache is later compared with.
        tokenizer: made the dataset; later compared like the teacher.
        weights: of several teachers, where they were learnt; the index keeps them.
    """

    teacher: Teacher
    dataset: Dataset
    collator: Collator
    identity: Identity
    tokenizer: Any = None
    weights: tuple[float, ...] | None = None


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


def spans_of(index: CacheIndex, shards: list[int]) -> dict[int, np.ndarray]:
    """By shard the places of its examples among all."""
    ends = np.cumsum([0, *(count for count, _ in index.shards)])
    return {number: np.arange(ends[number], ends[number + 1]) for number in shards}


@dataclass(frozen=True)
class Batches:
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
        found = self.outputs(some[:1].tolist())[1]
        classes = self.settings.classes if isinstance(found, SparseTargets) else found.shape[1]
        assert classes is not None, "checked with the targets"
        return classes, sum(map(len, self.blocks(some).values())) / examples.items[some].sum()

    def write(self, folder: Path, index: CacheIndex, shards: list[int], title: str) -> None:
        """Write shards, one after the other."""
        spans, examples = spans_of(index, shards), self.examples
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
            blocks |= zip(batch, self._coded(batch, *self.outputs(batch)), strict=True)
            advance(int(self.examples.items[batch].sum()))
        return blocks

    def outputs(self, batch: list[int]) -> tuple[list[bytes], torch.Tensor | SparseTargets]:
        """Per example the bits that mark its items, and the (items, classes) logits or the targets of all in order."""
        rows = [self.dataset[int(self.examples.rows[at])] for at in batch]
        chosen = [chosen_tokens(row, self.settings)[1] for row in rows]
        inputs = {name: value.to(self.writing.device) for name, value in self.source.collator(rows).items()}
        kind, positions = self.settings.kind, None
        self._check_batch(inputs, batch, chosen)
        if kind != "example":
            positions = counted(inputs, kind, self.settings.unlabelled).flatten().nonzero().squeeze(-1)
        bits = [b"" if kind == "example" else np.packbits(own).tobytes() for own in chosen]
        found = self.source.teacher.signals(inputs, positions=positions)
        if isinstance(found, SparseSignals):
            return bits, self._checked(found.targets)
        logits = found.logits
        if logits.dim() != 2 or len(logits) != self.examples.items[batch].sum():
            accepted = "the kind of the teacher's outputs (losses.items.kind_of)"
            raise InputError("kind", f"{kind} with logits {list(logits.shape)}", accepted)
        logits = logits[:, : self.settings.classes]
        if not logits.amax(-1).isfinite().all():  # minus infinity is a class that the teacher masks
            raise InputError("teacher", "logits that are not finite", "a teacher with finite logits in its dtype")
        return bits, logits

    def _checked(self, targets: SparseTargets) -> SparseTargets:
        """Targets of a teacher that knows a few tokens of each item, if the cache is one of such tokens."""
        settings, known = self.settings, targets.ids.shape[1]
        if settings.method != "topk" or settings.classes is None or settings.k != known:
            accepted = f"topk with k={known} and the number of classes: the teacher knows so many tokens of each output"
            raise InputError("settings", f"{settings.method} with k={settings.k}", accepted)
        return targets

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

    def _coded(self, batch: list[int], bits: list[bytes], outputs: torch.Tensor | SparseTargets) -> Iterator[bytes]:
        counts = self.examples.items[batch]
        if isinstance(outputs, SparseTargets):
            assert self.settings.classes is not None, "checked with the targets"
            coding = ItemCoding(self.settings.classes, self.settings.k, self.settings.method)
            if coding.classes > coding.k:
                yield from self._blocks(coding, bits, counts, coding.of_targets(outputs))
                return
            empty = outputs.probabilities.new_full((len(outputs.ids), coding.classes), -torch.inf)
            outputs = empty.scatter_reduce_(1, outputs.ids, outputs.probabilities.log(), "amax")
        logits, classes = outputs, outputs.shape[1]
        if classes <= self.settings.k:
            parts = np.split(logits.float().cpu().numpy(), np.cumsum(counts)[:-1])
            yield from (zlib.compress(head + own.tobytes()) for head, own in zip(bits, parts, strict=True))
            return
        coding = ItemCoding(classes, self.settings.k, self.settings.method)
        points = np.concatenate([self._uniforms(at, count) for at, count in zip(batch, counts, strict=True)])
        step = max(1, (CPU_ELEMENTS if logits.device.type == "cpu" else CHUNK_ELEMENTS) // classes)
        chunks = [slice(start, start + step) for start in range(0, len(logits), step)]
        tokens = [coding.encode(logits[chunk], points[chunk]) for chunk in chunks]
        all_tokens = Tokens(*(np.concatenate(each) for each in zip(*tokens, strict=True)))
        yield from self._blocks(coding, bits, counts, all_tokens)

    @staticmethod
    def _blocks(coding: ItemCoding, bits: list[bytes], counts: np.ndarray, tokens: Tokens) -> Iterator[bytes]:
        """The block of each example, of the tokens of all, one after the other."""
        ends = np.cumsum(counts)
        token_ends = np.cumsum(tokens.widths, dtype=np.int64)[ends - 1]
        by_item = [np.split(each, ends[:-1]) for each in (tokens.widths, tokens.scalars)]
        by_token = [np.split(each, token_ends[:-1]) for each in (tokens.gaps, tokens.numbers)]
        for head, *own in zip(bits, *by_item, *by_token, strict=True):
            yield zlib.compress(head + coding.join(Tokens(*own)))

    def _uniforms(self, at: int, count: int) -> np.ndarray:
        """The random numbers of an example depend on its content and the seed alone."""
        key = int.from_bytes(self.examples.keys[at].tobytes(), "little")
        return np.random.Generator(np.random.Philox(key=key, counter=self.settings.seed)).random(count)
