"""What a teacher cache is made from: the different examples of a dataset, and fingerprints that tell one source from another."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.data.labelled import TEACHER_OF
from distill_llm.losses.items import counted, valid_tokens
from distill_llm.models.fingerprints import teacher_fingerprint
from distill_llm.teachers.cache_format import KEY, CacheIndex, CacheSettings, example_key

OTHER_INPUTS = ("token_type_ids", "position_ids")


@dataclass(frozen=True)
class MixtureIdentity:
    """What tells one mixture of teachers from another.

    Attributes:
        models: in memory, or their folders, in order.
        how: what they are mixed by: plain JSON.
    """

    models: tuple[PreTrainedModel | str | Path, ...]
    how: Mapping[str, Any]


@dataclass(frozen=True)
class ServedIdentity:
    """What tells a served model from another one: only its name, since its weights are elsewhere."""

    model: str


Identity: TypeAlias = PreTrainedModel | str | Path | MixtureIdentity | ServedIdentity
"""A teacher as a cache knows it: a model in memory, its folder, several of them, or one that is served."""


def identity_fingerprint(identity: Identity) -> str:
    """A hash of a teacher (see `teacher_fingerprint`), or of several and how they are mixed."""
    if isinstance(identity, ServedIdentity):
        return "served:" + hashlib.blake2b(identity.model.encode(), digest_size=16).hexdigest()
    if not isinstance(identity, MixtureIdentity):
        return teacher_fingerprint(identity)
    parts = [*map(teacher_fingerprint, identity.models), json.dumps(identity.how, sort_keys=True)]
    return "several:" + hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Examples:
    """The different examples of a dataset, sorted by key.

    Attributes:
        keys: (E,) of KEY.
        rows: (E,) for each example a row of the dataset that has it.
        items, tokens: (E,) how many items and valid tokens each example has.
        fingerprint: of all examples, whatever their order and however often they occur.
    """

    keys: np.ndarray
    rows: np.ndarray
    items: np.ndarray
    tokens: np.ndarray
    fingerprint: str


def find_examples(dataset: Dataset, settings: CacheSettings) -> Examples:
    """Read the examples of a tokenized dataset.

    Args:
        dataset: with `input_ids` and, if it has them, `attention_mask`, `labels` (they say which tokens count),
            `token_type_ids` and `position_ids`, each a list as long as the ids.
        settings: what is stored of an example; examples without an item are left out.

    Raises:
        InputError: no `input_ids`, nothing to store, or examples with the same input ids that are otherwise different.
    """
    if "input_ids" not in dataset.column_names:
        raise InputError("dataset", dataset.column_names, "a tokenized dataset with a column input_ids")
    needs_labels = settings.kind != "example" and not settings.unlabelled
    read = ["input_ids", "attention_mask", *OTHER_INPUTS, *(["labels"] if needs_labels else [])]
    names = [name for name in read if name in dataset.column_names]
    owned = TEACHER_OF in dataset.column_names
    found: dict[bytes, tuple[bytes, int, int, int]] = {}
    row = 0
    chosen_columns = [*names, *([TEACHER_OF] if owned else [])]
    for table in dataset.select_columns(chosen_columns).with_format("arrow").iter(batch_size=1000):
        owners = table.column(TEACHER_OF).to_pylist() if owned else None
        columns = {name: _rows(name, table.column(name)) for name in names}
        for number in range(len(table)):
            example = {name: column[number] for name, column in columns.items()}
            mask, chosen = chosen_tokens(example, settings)
            key = example_key(example["input_ids"][mask])
            content = hashlib.blake2b(np.packbits(chosen).tobytes(), key=key, digest_size=16)
            for name in OTHER_INPUTS:
                if name in example:
                    content.update(example[name][mask].astype("<u4").tobytes())
            if owners is not None:
                content.update(str(owners[number]).encode())
            count = 1 if settings.kind == "example" else int(chosen.sum())
            known = found.setdefault(key, (content.digest(), row, count, len(chosen)))
            if known[0] != content.digest():
                accepted = (
                    "the same token types, positions, labelled tokens and teacher in examples with the same input ids"
                )
                raise InputError("dataset", f"rows {known[1]} and {row}", accepted)
            row += 1
    kept = {key: each for key, each in found.items() if each[2]}
    if not kept:
        raise InputError(
            "dataset", f"{row} rows without an output to store", "rows with valid tokens whose outputs count"
        )
    keys = np.frombuffer(b"".join(kept), dtype=KEY)
    order = np.argsort(keys, order=("high", "low"))
    keys = keys[order]
    contents, *numbers = zip(*kept.values(), strict=True)
    digest = hashlib.blake2b(keys.tobytes() + b"".join(contents[at] for at in order), digest_size=16)
    rows, counts, lengths = (np.array(each)[order] for each in numbers)
    return Examples(keys, rows, counts, lengths, digest.hexdigest())


def _rows(name: str, column: pa.ChunkedArray) -> list[np.ndarray]:
    if not hasattr(column.type, "value_type"):
        raise InputError(f"dataset.{name}", str(column.type), "a list per example, as long as its input_ids")
    lists = column.combine_chunks()
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return np.split(values, np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False))[:-1])


def chosen_tokens(example: Mapping[str, Any], settings: CacheSettings) -> tuple[np.ndarray, np.ndarray]:
    """(T,) of bool, the valid tokens of a row; and (valid tokens,) of bool, which of them are items.

    Where items are examples no token is one.
    """
    columns = ["input_ids", "attention_mask", *(("position_ids", "labels") if settings.kind != "example" else ())]
    row = {name: torch.from_numpy(np.array(example[name]))[None] for name in columns if example.get(name) is not None}
    mask = valid_tokens(row)[0].numpy()
    if settings.kind == "example":
        return mask, np.zeros(mask.sum(), dtype=bool)
    return mask, counted(row, settings.kind, settings.unlabelled)[0].numpy()[mask]


def check_fingerprints(
    index: CacheIndex, folder: Path, fingerprints: Mapping[str, str], settings: CacheSettings | None = None
) -> None:
    """Raise one InputError that names everything in which a cache differs from its intended use."""
    changed = [name for name, value in fingerprints.items() if index.fingerprints.get(name) != value]
    if settings is not None:
        old, new = vars(index.settings), vars(settings)
        changed += [f"{name} ({old[name]}, not {new[name]})" for name in new if old[name] != new[name]]
    if changed:
        fix = "choose another folder, or write the cache again: it must be of the same teacher, tokenizer and data"
        raise InputError("cache", f"{folder}, made with another {' and '.join(changed)}", fix=fix)
