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
less probable it is than the item's most probable token. Small distances and numbers compress well: of
the three bytes of an id under 151,936 about one is left. Only tokens that were drawn take room, and 50 draws from a language
model hit about 25 different tokens.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from distill_llm.common.errors import InputError, one_of
from distill_llm.losses.units import Kind

FORMAT = 4
INDEX_NAME = "index.json"
KEY = np.dtype([("high", "<u8"), ("low", "<u8")])
METHODS = ("sampled", "topk")


@dataclass(frozen=True)
class CacheSettings:
    """What is stored of a teacher.

    The distribution is always stored at temperature 1. Only a `full` cache can be used at another temperature: that needs
    every token's probability, also of those that a cut or sampled distribution leaves out.

    Args:
        k: draws (`sampled`) or most probable tokens (`topk`) per item, 1 to 255. Up to k classes are stored in full.
        method: `sampled` (Random Sampling Knowledge Distillation, Anshumann et al., 2025; unbiased) or `topk`.
        kind: what an output of the teacher is about: `next_token`, `token` or `example` (see `losses.items.kind_of`).
        unlabelled: store outputs without a label too (see `losses.items.counted`, which says what an item is).
        classes: only the first logits (vocabularies padded to different sizes); None: all.
        seed: of the draws.
        dtype: precision of the teacher's weights; None: not known.

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
    """What a cache is: settings, number of classes, fingerprints by name, and (examples, items) of each shard.

    `weights` are those of several teachers, where they were learnt.
    """

    settings: CacheSettings
    classes: int
    fingerprints: dict[str, str]
    shards: tuple[tuple[int, int], ...]
    weights: tuple[float, ...] | None = None

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
        fields = {name: value for name, value in asdict(self).items() if name != "weights" or value is not None}
        return json.dumps({"format": FORMAT, **fields}, indent=1) + "\n"

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
            raise InputError("cache", str(folder), fix=f"write the cache again: this version reads format {FORMAT}")
        shards = tuple((int(examples), int(items)) for examples, items in fields.pop("shards"))
        weights = tuple(map(float, fields.pop("weights"))) if "weights" in fields else None
        return CacheIndex(settings=CacheSettings(**fields.pop("settings")), shards=shards, weights=weights, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, InputError) and error.field == "cache":
            raise
        raise InputError("cache", str(path), f"the {INDEX_NAME} of a teacher cache: this one is damaged") from None


def example_key(ids: np.ndarray) -> bytes:
    """16 bytes that stand for the valid input ids (T,) of an example, wherever it is in a batch and however padded."""
    return hashlib.blake2b(np.ascontiguousarray(ids, dtype="<u4").tobytes(), digest_size=16).digest()
