"""How a teacher's signals lie on disk: which example is which, how an item is coded, and the files.

A cache is a folder of `index.json` and shards. A shard is a safetensors file with, for each of its examples in the order
of their keys, one block of bytes and what is needed to find and check it:

    keys (E, 16) uint8     content hash of the example's valid input ids; sorted over all shards
    starts (E + 1,) int64  where each block starts in `blocks`
    items (E,) int64       how many items the example has
    checks (E,) int64      CRC-32 of the block
    blocks (bytes,) uint8

A block is compressed (zlib). It has one bit per valid token, set where the token is an item (left out where items are
examples), then

    full      the logits, fp32: where the classes are no more than k
    topk      per item the number of tokens held, uint8, and the mass of all others, uint16 in 1/65535; then the tokens
    sampled   per item the number of tokens drawn, uint8, and their cross-entropy with the teacher in nats, fp16; then the
              tokens

The tokens of an item go in the order of their ids, and each id is stored as its distance to the one before: the low bytes
of all, then the next bytes, and so on. One byte a token follows: for `sampled` how often it was drawn, for `topk` how much
less probable it is than the item's most probable token. The small distances and numbers are what compresses: of three
bytes for an id under 151,936 about one is left. Only tokens that were drawn take room, and 50 draws from a language model
hit about half as many tokens.
"""

import hashlib
import json
import math
import os
import uuid
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from safetensors.numpy import save

from distill_llm.common.errors import InputError, one_of
from distill_llm.common.processes import exact_device
from distill_llm.losses.sparse import SparseTargets, entropy_of
from distill_llm.losses.units import Kind

FORMAT = 4
INDEX_NAME = "index.json"
KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
MIN_PROBABILITY = 2.0**-10  # what a top k holds besides the first token; less goes to the rest
LEVELS = 50  # steps of a ratio of probabilities
BLOCK = 64  # tokens whose probabilities are summed before one of them is looked for
BELOW_ONE = 1 - 2**-53
METHODS = ("sampled", "topk")


@dataclass(frozen=True)
class CacheSettings:
    """What is stored of a teacher.

    The distribution is always stored at temperature 1. Another temperature can be had afterwards of a `full` cache only:
    of a cut or sampled distribution, the tokens left out would have to be known one by one.

    Args:
        k: draws (`sampled`) or most probable tokens (`topk`) per item, 1 to 255. Up to k classes are stored in full.
        method: `sampled` (Random Sampling Knowledge Distillation, Anshumann et al., 2025; unbiased) or `topk`.
        kind: what an output of the teacher is about: `next_token`, `token` or `example` (see `losses.items.kind_of`).
        unlabelled: store outputs without a label too (see `losses.items.counted`, which says what an item is).
        classes: only the first logits (vocabularies padded to different sizes); None: all.
        seed: of the draws.
        dtype: precision of the teacher's weights; None: not said, as of a teacher that is no folder.

    Raises:
        InputError: names the field.
    """

    k: int = 50
    method: Literal["sampled", "topk"] = "sampled"
    kind: Kind = "next_token"
    unlabelled: bool = False
    classes: int | None = None
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 255:
            raise InputError("k", self.k, "a whole number from 1 to 255")
        if self.method not in METHODS:
            raise InputError("method", self.method, one_of(METHODS, self.method))
        if self.kind not in get_args(Kind):
            raise InputError("kind", self.kind, one_of(get_args(Kind), self.kind))
        if self.seed < 0:
            raise InputError("seed", self.seed, "a whole number of at least 0")


@dataclass(frozen=True)
class CacheIndex:
    """What a cache is: settings, number of classes, fingerprints by name, and (examples, items) of each shard."""

    settings: CacheSettings
    classes: int
    fingerprints: dict[str, str]
    shards: tuple[tuple[int, int], ...]

    @property
    def coding(self) -> Literal["full", "topk", "sampled"]:
        """How blocks are coded."""
        return "full" if self.classes <= self.settings.k else self.settings.method

    @property
    def digest(self) -> str:
        """Names this cache in its shards."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    def to_json(self) -> str:
        """The text of `index.json`."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    def shard_path(self, folder: Path, number: int) -> Path:
        """Where a shard is."""
        return folder / f"shard-{number:05d}-of-{len(self.shards):05d}.safetensors"


def read_index(folder: Path) -> CacheIndex:
    """The index of a cache.

    Raises:
        InputError: there is none, or none that this version can read.
    """
    path, accepted = folder / INDEX_NAME, "a folder with a teacher cache"
    if not path.is_file():
        raise InputError("cache", str(folder), f"{accepted} ({INDEX_NAME} is missing)")
    try:
        fields = json.loads(path.read_text())
        if fields.pop("format") != FORMAT:
            raise InputError("cache", str(folder), f"{accepted} of format {FORMAT}: write it again")
        shards = tuple((int(examples), int(items)) for examples, items in fields.pop("shards"))
        return CacheIndex(settings=CacheSettings(**fields.pop("settings")), shards=shards, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError) and error.field == "cache":
            raise
        raise InputError("cache", str(path), f"the {INDEX_NAME} of a teacher cache: this one is damaged") from None


def example_key(ids: np.ndarray) -> bytes:
    """16 bytes that stand for the valid input ids (T,) of an example, wherever it is in a batch and however padded."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<u4").tobytes(), digest_size=16).digest()


# Items: from logits to bytes and back.


class Tokens(NamedTuple):
    """The tokens that items hold: (items,) how many, (items,) a scalar of each item, and of each token gap and number.

    The scalar is the mass of all other tokens (`topk`) or the mean of -log p over the draws, in nats (`sampled`).
    """

    widths: np.ndarray
    scalars: np.ndarray
    gaps: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class ItemCoding:
    """From the logits of items to the bytes of a block and back.

    Args:
        classes: of the logits.
        k, method: as of the settings.
    """

    classes: int
    k: int
    method: str

    @property
    def planes(self) -> int:
        """Bytes of an id."""
        return max(1, -(-(self.classes - 1).bit_length() // 8))

    def encode(self, logits: torch.Tensor, uniforms: np.ndarray) -> Tokens:
        """Choose the tokens of some items.

        Args:
            logits: (items, classes), finite.
            uniforms: (items,) random numbers in [0, 1) that decide the draws.
        """
        logits = logits.to(exact_device(logits.device))
        if self.method == "topk":
            ids, numbers, held, scalars = self._top(logits.float())
        else:
            ids, numbers, held, scalars = self._draws(logits.float(), torch.from_numpy(uniforms).to(logits.device))
        gaps = torch.diff(ids, dim=-1, prepend=torch.zeros_like(ids[:, :1]))
        columns = (held.sum(-1).byte(), scalars, gaps[held].int(), numbers[held].byte())
        return Tokens(*(each.cpu().numpy() for each in columns))

    def _top(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logs of ratios on a grid that is finest near the top: errors weigh about the same everywhere in a KL."""
        log_p, ids = logits.log_softmax(-1).topk(self.k, dim=-1)
        held = log_p >= math.log(MIN_PROBABILITY)
        held[:, 0] = True
        numbers = (LEVELS * ((log_p[:, :1] - log_p) / -math.log(MIN_PROBABILITY)).clamp(max=1).sqrt()).round().long()
        rest = (1 - (log_p.exp() * held).sum(-1, dtype=torch.float64)).clamp(0, 1).float()
        order = torch.where(held, ids, self.classes).argsort(-1)
        return ids.gather(1, order), numbers.gather(1, order), held.gather(1, order), rest

    def _draws(self, logits: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """k draws an item at evenly spaced points of the cumulative distribution, moved by one random number.

        A token is expected count = k p times, as with independent draws, but its count is off by less than one.
        """
        probabilities = torch.nn.functional.pad(logits.softmax(-1), (0, -logits.shape[-1] % BLOCK))
        blocks = probabilities.unflatten(-1, (-1, BLOCK))
        ends = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
        points = (uniforms[:, None] + torch.arange(self.k, device=logits.device)) / self.k
        points = points.clamp_(max=BELOW_ONE) * ends[:, -1:]
        at = torch.searchsorted(ends, points, right=True)  # the block of each point first, then the token in it
        starts = torch.nn.functional.pad(ends, (1, 0))
        start, size = starts.gather(1, at), torch.diff(starts).gather(1, at)
        inside = blocks.gather(1, at[..., None].expand(-1, -1, BLOCK)).cumsum(-1, dtype=torch.float64)
        share = ((points - start) / size).clamp_(max=BELOW_ONE)
        drawn = torch.searchsorted(inside, share[..., None] * inside[..., -1:], right=True).squeeze(-1)
        drawn += at * BLOCK
        slots = torch.nn.functional.pad((drawn[:, 1:] != drawn[:, :-1]).long().cumsum(-1), (1, 0))
        ids = torch.zeros_like(drawn).scatter_(1, slots, drawn)
        counts = torch.zeros_like(drawn).scatter_add_(1, slots, torch.ones_like(drawn))
        p = probabilities.gather(1, drawn).clamp(min=torch.finfo(torch.float32).tiny)
        return ids, counts, counts > 0, -p.log().mean(-1)

    def join(self, tokens: Tokens) -> bytes:
        """Items as they lie in a block."""
        topk = self.method == "topk"
        scalars = np.rint(tokens.scalars * 65535).astype("<u2") if topk else tokens.scalars.astype("<f2")
        gaps = tokens.gaps.astype("<i4").view(np.uint8).reshape(-1, 4)[:, : self.planes].T
        return tokens.widths.tobytes() + scalars.tobytes() + gaps.tobytes() + tokens.numbers.tobytes()

    def split(self, block: np.ndarray, items: int) -> Tokens:
        """The items of a block (bytes,), its bits left out."""
        scalars = block[items : 3 * items].view("<u2" if self.method == "topk" else "<f2").astype(np.float32)
        if self.method == "topk":
            scalars /= 65535
        columns = block[3 * items :].reshape(self.planes + 1, -1)
        gaps = columns[0].astype(np.int32)
        for plane in range(1, self.planes):
            gaps |= columns[plane].astype(np.int32) << (8 * plane)
        return Tokens(block[:items], scalars, gaps, columns[-1])

    def decode(self, tokens: Tokens) -> SparseTargets:
        """The targets of items, k the largest number of tokens of an item, ids (int32) ascending."""
        if self.method == "topk":
            log_ratios = math.log(MIN_PROBABILITY) * np.square(np.arange(LEVELS + 1) / LEVELS)
            weights, rest = np.exp(log_ratios).astype(np.float32)[tokens.numbers], tokens.scalars
        else:
            weights, rest = tokens.numbers.astype(np.float32), np.zeros_like(tokens.scalars)
        held = np.arange(tokens.widths.max(initial=1)) < tokens.widths[:, None]
        ids = np.zeros(held.shape, dtype=np.int32)
        ids[held] = tokens.gaps
        np.cumsum(ids, axis=1, out=ids)
        p = np.zeros(held.shape, dtype=np.float32)
        p[held] = weights
        p *= ((1 - rest) / p.sum(-1))[:, None]
        held_p, others = torch.from_numpy(p), torch.from_numpy(rest)
        nll = entropy_of(held_p, others) if self.method == "topk" else torch.from_numpy(tokens.scalars)
        return SparseTargets(torch.from_numpy(ids), held_p, others, nll)


# Files.


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also where several processes write the same one."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


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
    write_whole(path, save(arrays, metadata={"cache": index.digest}))


def map_shard(folder: Path, index: CacheIndex, number: int) -> Mapping[str, np.ndarray]:
    """The arrays of a shard, `keys` as (E,) of KEY; memory-mapped, nothing but the header is read.

    Raises:
        InputError: it is missing, cut off, damaged or of another cache.
    """
    path, examples = index.shard_path(folder, number), index.shards[number][0]
    again = "write the cache again into this folder: only this shard will be made"
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length) if length < size else b"")
        owner = header.pop("__metadata__", {}).get("cache")
        spans = {name: slice(*entry["data_offsets"]) for name, entry in header.items()}
        if size != 8 + length + max(span.stop for span in spans.values()):
            raise InputError("cache", str(path), "a whole shard: this one is cut off, " + again)
        raw = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length).view(np.ndarray)
        arrays = {name: raw[spans[name]].view("<i8") for name in ("starts", "items", "checks")}
        arrays |= {"keys": raw[spans["keys"]].view(KEY), "blocks": raw[spans["blocks"]]}
        lengths = [len(arrays[name]) for name in ("keys", "items", "checks", "starts")]
    except FileNotFoundError:
        raise InputError("cache", str(path), "all shards of the cache: this one is missing, " + again) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError("cache", str(path), "a whole shard: this one is damaged, " + again) from None
    if owner != index.digest or lengths != [examples, examples, examples, examples + 1]:
        raise InputError("cache", str(path), f"a shard of the cache that {INDEX_NAME} describes: " + again)
    return arrays
