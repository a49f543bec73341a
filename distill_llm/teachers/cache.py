"""A teacher that is a folder: its signals were written once and are looked up for every batch."""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.data.special_tokens import tokenizer_fingerprint
from distill_llm.losses.items import is_language_model, kind_of, valid_tokens
from distill_llm.losses.signals import Signals, SparseSignals
from distill_llm.losses.sparse import SparseTargets
from distill_llm.losses.terms.term import Gives
from distill_llm.teachers.base import Teacher
from distill_llm.teachers.cache_coding import ItemCoding, Tokens
from distill_llm.teachers.cache_contents import Identity, check_fingerprints, find_examples, identity_fingerprint
from distill_llm.teachers.cache_format import CacheIndex, example_key, read_index
from distill_llm.teachers.cache_shards import check_of, map_shard
from distill_llm.teachers.compatibility import tokens_in_use


class CachedTeacher(Teacher):
    """The signals of a teacher from the folder that `write_cache` made.

    Examples are found by the content of their valid input ids: in any order, any number of times, in any process, padded
    on either side. Files are memory-mapped, and each block is checked when it is read. A `full` cache (up to k classes) gives
    the teacher's logits, for any divergence and temperature; the others give SparseSignals, for `losses.sparse`.

    Args:
        path: the folder.
        teacher: the model or folder that the cache must be of, or several and their mixture; None: not compared.
        tokenizer, dataset: likewise. The dataset may be in another order, but must have the same examples.

    Attributes:
        index: settings and kind of the cache.

    Raises:
        InputError: one line that names the fault: no cache, not finished, damaged, or made from another teacher, tokenizer
            or dataset.
    """

    prefetches = True

    def __init__(
        self,
        path: str | Path,
        teacher: Identity | None = None,
        tokenizer: Any = None,
        dataset: Dataset | None = None,
    ):
        self.folder = Path(path)
        self.index: CacheIndex = read_index(self.folder)
        self.check(teacher, tokenizer, dataset)
        self._shards = [map_shard(self.folder, self.index, number) for number in range(len(self.index.shards))]
        self._first = np.array([shard["keys"][0] for shard in self._shards])
        self._per_token = self.index.settings.kind != "example"

    def check(self, teacher: Identity | None = None, tokenizer: Any = None, dataset: Dataset | None = None) -> None:
        """Compare the cache with what it is to be used with, as far as that is known.

        Args:
            teacher, tokenizer, dataset: as of the class.

        Raises:
            InputError: the cache was made from another of them.
        """
        given: dict[str, str] = {}
        if teacher is not None:
            given["teacher"] = identity_fingerprint(teacher)
        if tokenizer is not None:
            given["tokenizer"] = tokenizer_fingerprint(tokenizer)
        if dataset is not None:
            given["data"] = find_examples(dataset, self.index.settings).fingerprint
        check_fingerprints(self.index, self.folder, given)

    @property
    def compact(self) -> bool:  # type: ignore[override]
        """Where a few tokens of each item are stored."""
        return self.index.coding != "full"

    @property
    def gives(self) -> Gives:
        """See `cache_gives`."""
        return cache_gives(self.index)

    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """See `Teacher.meet`.

        Raises:
            InputError: the cache is of another kind of output, of tokens that the student does not have, or of too few.
        """
        settings, kind = self.index.settings, kind_of(student)
        if settings.kind != kind:
            accepted = f"a cache of kind {kind}, which {type(student).__name__} needs"
            raise InputError("teacher", f"a cache of kind {settings.kind}", accepted)
        if settings.kind == "token" and not settings.unlabelled:
            raise InputError(
                "teacher", "a cache of labelled tokens", "a cache of all tokens, written with unlabelled=True"
            )
        own = student.config.num_labels
        if is_language_model(student):
            own = student.config.get_text_config().vocab_size
            used = tokens_in_use(tokenizer)
            if used is not None and used <= self.index.classes <= own:
                return None if self.index.classes == own else self.index.classes
        if self.index.classes != own:
            accepted = f"a cache of {own} classes, as the student has (CacheSettings.classes cuts a padded vocabulary)"
            raise InputError("teacher", f"a cache of {self.index.classes} classes", accepted)
        return None

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`: those that `prefetch` added to the batch, or else looked up now.

        Raises:
            InputError: as `prefetch`.
        """
        device = batch["input_ids"].device
        found = batch if self._names[0] in batch else self.prefetch(batch, positions)
        columns = [found[name].to(device, non_blocking=True) for name in self._names]
        if self.index.coding == "full":
            return Signals(logits=columns[0])
        targets = SparseTargets(columns[0].long(), *columns[1:])
        return SparseSignals(logits=targets.probabilities.new_empty(len(targets.ids), 0), targets=targets)

    def prefetch(self, batch: Mapping[str, torch.Tensor], positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """See `Teacher.prefetch`; `positions` are not used where items are examples.

        Returns:
            `cached_logits` (items, V); or the `cached_ids` (items, k) int32, `cached_probabilities` (items, k),
            `cached_rest` (items,) and `cached_teacher_nll` (items,) of SparseTargets.

        Raises:
            InputError: an example that is not in the cache, a position that has no signals, a damaged block.
        """
        ids, valid = batch["input_ids"].cpu().numpy(), valid_tokens(batch).cpu().numpy()
        if not self._per_token:
            parts = [self._block(row[mask])[0] for row, mask in zip(ids, valid, strict=True)]
            return self._decoded(parts, np.ones(len(ids), dtype=np.int64), None)
        if positions is None:
            raise InputError("positions", None, "flat positions of tokens, because this cache has signals of tokens")
        wanted = positions.cpu().numpy()
        item_at = np.full(ids.shape, -1, dtype=np.int64)
        parts, counts, total = [], [], 0
        for row in np.unique(wanted // ids.shape[1]).tolist():
            block, count = self._block(ids[row][valid[row]])
            columns = np.flatnonzero(valid[row])
            marked = -(-len(columns) // 8)
            chosen = columns[np.unpackbits(block[:marked], count=len(columns)).view(bool)]
            item_at[row, chosen] = np.arange(total, total + count)
            parts.append(block[marked:])
            counts.append(count)
            total += count
        items = item_at.reshape(-1)[wanted]
        if (items < 0).any():
            at = divmod(int(wanted[items < 0][0]), ids.shape[1])
            accepted = f"positions that the cache holds by its settings, {self.index.settings}"
            raise InputError("positions", f"example {at[0]} of the batch, token {at[1]}", accepted)
        everything = len(items) == total and (items == np.arange(total)).all()
        return self._decoded(parts, np.array(counts, dtype=np.int64), None if everything else items)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)  # a worker of a data loader maps the files itself

    @property
    def _names(self) -> tuple[str, ...]:
        if self.index.coding == "full":
            return ("cached_logits",)
        return ("cached_ids", "cached_probabilities", "cached_rest", "cached_teacher_nll")

    def _block(self, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """The unpacked block of an example and its number of items."""
        key = np.frombuffer(example_key(ids), dtype=self._first.dtype)
        number = int(np.searchsorted(self._first, key, side="right")[0]) - 1
        shard = self._shards[max(0, number)]
        at = int(np.searchsorted(shard["keys"], key)[0])
        if at == len(shard["keys"]) or shard["keys"][at] != key[0]:
            start = f"{ids[:8].tolist()}{'...' if len(ids) > 8 else ''}, {len(ids)} tokens"
            accepted = "examples of the dataset that the cache was written for, cut to the same length"
            raise InputError("input_ids", start, accepted)
        block, count = shard["blocks"][slice(*shard["starts"][at : at + 2])], int(shard["items"][at])
        if check_of(block, count) != shard["checks"][at]:
            path = self.index.shard_path(self.folder, number)
            raise InputError(
                "cache", str(path), fix="remove it and write the cache again into its folder: the shard is damaged"
            )
        return np.frombuffer(zlib.decompress(block.tobytes()), dtype=np.uint8), count

    def _decoded(
        self, parts: list[np.ndarray], counts: np.ndarray, items: np.ndarray | None
    ) -> dict[str, torch.Tensor]:
        """Decode blocks (without the bits that mark the items), and choose items."""
        chosen = slice(None) if items is None else torch.from_numpy(items)
        if self.index.coding == "full":
            raw = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint8)
            logits = torch.from_numpy(raw.view("<f4").reshape(-1, self.index.classes))[chosen]
            return dict(zip(self._names, [logits], strict=True))
        settings = self.index.settings
        coding = ItemCoding(self.index.classes, settings.k, settings.method)
        both = zip(parts, counts.tolist(), strict=True)
        coded = [coding.split(part, count) for part, count in both] or [coding.split(np.empty(0, dtype=np.uint8), 0)]
        targets = coding.decode(Tokens(*(np.concatenate(each) for each in zip(*coded, strict=True))))
        return dict(zip(self._names, targets.rows(chosen), strict=True))


def cache_gives(index: CacheIndex) -> Gives:
    """What such a cache can give: logits, or a few tokens of each item, of the examples of its dataset."""
    few = None if index.coding == "full" else (index.settings.k, index.classes)
    return Gives("a cached teacher", few=few, new_text=False)
