"""What a teacher cache is made from: fingerprints of teacher and tokenizer, and the different examples of a dataset."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.data.special_tokens import token_rules
from distill_llm.errors import InputError
from distill_llm.losses.items import counted, valid_tokens
from distill_llm.teachers.cache_format import KEY, CacheIndex, CacheSettings, example_key

OTHER_INPUTS = ("token_type_ids", "position_ids")


def teacher_fingerprint(teacher: PreTrainedModel | str | Path) -> str:
    """A hash of a model's config and of every byte of its weights: about a second per GB, once in a process.

    Of a model in memory: names, shapes, dtypes and values of its tensors. Of a folder: its safetensors files. The two
    differ; a cache is checked with what it was written with. Names of folders and versions of transformers do not count.

    Raises:
        InputError: a folder without config.json or safetensors.
    """
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(teacher, PreTrainedModel):
        digest.update(_stable_config(teacher.config.to_dict()))
        for name, tensor in sorted(teacher.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy())
        return "memory:" + digest.hexdigest()
    folder = Path(teacher)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise InputError("teacher", str(folder), "a folder with config.json and safetensors files")
    digest.update(_stable_config(json.loads((folder / "config.json").read_text())))
    with ThreadPoolExecutor() as threads:  # hashing and reading let other threads run
        stamps = [(path.resolve(), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
        for path, own in zip(files, threads.map(lambda stamp: _file_digest(*stamp), stamps), strict=True):
            digest.update(path.name.encode() + own)
    return "files:" + digest.hexdigest()


@cache
def _file_digest(path: Path, size: int, changed: int) -> bytes:
    """Hash of a whole file; known for the rest of the process unless its size or time of change differ."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _stable_config(config: Any) -> bytes:
    def stable(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        kept = {str(k): stable(v) for k, v in value.items()}
        return {
            k: v for k, v in kept.items() if not k.startswith("_") and k not in ("transformers_version", "use_cache")
        }

    return json.dumps(stable(config), sort_keys=True, default=str).encode()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of what makes tokens of a text (`token_rules`); None gives 'none'."""
    if tokenizer is None:
        return "none"
    return hashlib.blake2b(token_rules(tokenizer).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Examples:
    """The different examples of a dataset, sorted by key.

    keys: (E,) of KEY. rows: (E,) a row of the dataset with each. items, tokens: (E,) how many items and valid tokens each has.
    fingerprint: of all of them, whatever their order and however often they occur.
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
        settings: what is stored of an example; those without an item are left out.

    Raises:
        InputError: no `input_ids`, nothing to store, or examples with the same input ids that are otherwise different.
    """
    if "input_ids" not in dataset.column_names:
        raise InputError("dataset", dataset.column_names, "a tokenized dataset with a column input_ids")
    needs_labels = settings.kind != "example" and not settings.unlabelled
    read = ["input_ids", "attention_mask", *OTHER_INPUTS, *(["labels"] if needs_labels else [])]
    names = [name for name in read if name in dataset.column_names]
    found: dict[bytes, tuple[bytes, int, int, int]] = {}
    row = 0
    for table in dataset.select_columns(names).with_format("arrow").iter(batch_size=1000):
        columns = {name: _rows(name, table.column(name)) for name in names}
        for number in range(len(table)):
            example = {name: column[number] for name, column in columns.items()}
            mask, chosen = chosen_tokens(example, settings)
            key = example_key(example["input_ids"][mask])
            content = hashlib.blake2b(np.packbits(chosen).tobytes(), key=key, digest_size=16)
            for name in OTHER_INPUTS:
                if name in example:
                    content.update(example[name][mask].astype("<u4").tobytes())
            count = 1 if settings.kind == "example" else int(chosen.sum())
            known = found.setdefault(key, (content.digest(), row, count, len(chosen)))
            if known[0] != content.digest():
                accepted = "examples of the same input ids with the same token types, positions and labelled tokens"
                raise InputError("dataset", f"rows {known[1]} and {row}", accepted)
            row += 1
    kept = {key: each for key, each in found.items() if each[2]}
    if not kept:
        raise InputError(
            "dataset", f"{row} rows with nothing to store", "rows with outputs that count, of valid tokens"
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
    columns = (
        ("input_ids", "attention_mask", "labels") if settings.kind != "example" else ("input_ids", "attention_mask")
    )
    row = {name: torch.from_numpy(np.array(example[name]))[None] for name in columns if example.get(name) is not None}
    mask = valid_tokens(row)[0].numpy()
    if settings.kind == "example":
        return mask, np.zeros(mask.sum(), dtype=bool)
    return mask, counted(row, settings.kind, settings.unlabelled)[0].numpy()[mask]


def check_fingerprints(
    index: CacheIndex, folder: Path, fingerprints: Mapping[str, str], settings: CacheSettings | None = None
) -> None:
    """Raise one InputError that names everything in which a cache differs from what it is to be used with."""
    changed = [name for name, value in fingerprints.items() if index.fingerprints.get(name) != value]
    if settings is not None:
        old, new = vars(index.settings), vars(settings)
        changed += [f"{name} ({old[name]}, not {new[name]})" for name in new if old[name] != new[name]]
    if changed:
        accepted = "a cache made with the same teacher, tokenizer and data: another folder, or write it again"
        raise InputError("cache", f"{folder}, made with another {' and '.join(changed)}", accepted)
