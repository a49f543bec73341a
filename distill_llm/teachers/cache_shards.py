"""The shards of a cache: safetensors files that are written whole and read by memory mapping.

What lies in them stands in `cache_format`.
"""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.teachers.cache_format import INDEX_NAME, KEY, CacheIndex


def check_of(block: Any, items: int) -> int:
    """CRC-32 of a block and its number of items."""
    return zlib.crc32(items.to_bytes(8, "little", signed=True), zlib.crc32(block))


def write_shard(path: Path, index: CacheIndex, keys: list[bytes], items: list[int], blocks: list[bytes]) -> None:
    """Write the blocks of a shard's examples, in the order of their keys."""
    arrays: dict[str, np.ndarray] = {
        "keys": np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(-1, 16),
        "starts": np.cumsum([0, *map(len, blocks)], dtype=np.int64),
        "items": np.array(items, dtype=np.int64),
        "checks": np.array([check_of(*each) for each in zip(blocks, items, strict=True)], dtype=np.int64),
        "blocks": np.frombuffer(b"".join(blocks), dtype=np.uint8),
    }
    with written_whole(path) as partial:
        partial.write_bytes(save(arrays, metadata={"cache": index.digest}))


def map_shard(folder: Path, index: CacheIndex, number: int) -> Mapping[str, np.ndarray]:
    """The arrays of a shard, `keys` as (E,) of KEY; memory-mapped, nothing but the header is read.

    Raises:
        InputError: it is missing, cut off, damaged or of another cache.
    """
    path, examples = index.shard_path(folder, number), index.shards[number][0]
    again = "write the cache again into this folder (only this shard is made anew)"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < size else b"")
        owner = header.pop("__metadata__", {}).get("cache")
        spans = {name: slice(*entry["data_offsets"]) for name, entry in header.items()}
        if size != 8 + length + max(span.stop for span in spans.values()):
            raise InputError("cache", str(path), "a whole shard: this one is cut off; " + again)
        raw = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length).view(np.ndarray)
        arrays = {name: raw[spans[name]].view("<i8") for name in ("starts", "items", "checks")}
        arrays |= {"keys": raw[spans["keys"]].view(KEY), "blocks": raw[spans["blocks"]]}
        lengths = [len(arrays[name]) for name in ("keys", "items", "checks", "starts")]
    except FileNotFoundError:
        raise InputError("cache", str(path), "all shards of the cache: this one is missing; " + again) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("cache", str(path), "a whole shard: this one is damaged; " + again) from None
    if owner != index.digest or lengths != [examples, examples, examples, examples + 1]:
        raise InputError("cache", str(path), f"a shard of the cache that {INDEX_NAME} describes; " + again)
    return arrays
