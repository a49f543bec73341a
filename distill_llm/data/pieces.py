"""The text of single tokens, as bytes, and which tokens of two tokenizers are the same text."""

import json
import re
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from distill_llm.data.special_tokens import document_end

BYTE = re.compile("<0x([0-9A-F]{2})>")
"""A token of one byte, as tokenizers of SentencePiece's kind write it."""


class Pieces:
    """What each token of a tokenizer adds to a text that it continues, in UTF-8: a token may be a part of a character.

    Args:
        tokenizer: fast or slow.

    Attributes:
        special: ids of tokens that are no text: special ones, and what stands for unknown text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self.special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
        self._plain = {number: token.content.encode() for number, token in added.items() if not token.special}
        self._byte_level = "ByteLevel" in _decoders(tokenizer)
        self._known: dict[int, bytes] = {}

    @cached_property
    def names(self) -> dict[int, str]:
        """The tokenizer's own name of each token."""
        return {number: name for name, number in self.tokenizer.get_vocab().items()}

    @cached_property
    def _has_bytes(self) -> bool:
        return {"<0x00>", "<0xFF>"} <= self.tokenizer.get_vocab().keys()

    @cached_property
    def _anchor(self) -> tuple[int, str]:
        """A token behind which others continue a text, and what it is decoded to."""
        token = self.tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        return token, self._decoded([token])

    def is_byte(self, token: int) -> bool:
        """Whether a token stands for one byte by its name."""
        return self._has_bytes and BYTE.fullmatch(self.names.get(token, "")) is not None

    def of(self, token: int, first: bool = False) -> bytes:
        """The bytes of a token that is not special; `first`: of one that begins a text, which may lose its space there."""
        if token not in self._known:
            self._known[token] = self._read(token)
        found = self._known[token]
        begins = first and found[:1] == b" " and not self._byte_level and token not in self._plain
        return found[1:] if begins and self._decoded([token]).encode() == found[1:] else found

    def _read(self, token: int) -> bytes:
        if token in self._plain:
            return self._plain[token]
        name = self.names.get(token, "")
        if self._byte_level:
            return bytes(_BYTES[letter] for letter in name if letter in _BYTES)
        if self._has_bytes and (found := BYTE.fullmatch(name)):
            return bytes([int(found[1], 16)])
        anchor, before = self._anchor
        return self._decoded([anchor, token]).removeprefix(before).encode()

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Shared(NamedTuple):
    """Tokens that are the same text in two tokenizers: ids of each, pair by pair, in the order of the first one's ids."""

    own: list[int]
    other: list[int]


def shared_tokens(own: Pieces, other: Pieces) -> Shared:
    """Pairs of tokens with equal bytes, and of special tokens with one role or name; each token is in at most one pair.

    A space at the beginning counts: `cat` within a word and ` cat` are different tokens.
    """
    pairs = dict(zip(*special_pairs(own, other), strict=True))
    taken = set(pairs.values())
    sides = [_by_text(pieces) for pieces in (own, other)]
    for key, ids in sides[0].items():
        pairs.update(zip(ids, sides[1].get(key, ()), strict=False))
    taken |= set(pairs.values())
    # A byte that one tokenizer has as <0xC3> may be an ordinary token of the other.
    left = {text: ids for (text, _), ids in sides[1].items() if not taken.issuperset(ids)}
    for (text, _), ids in sides[0].items():
        free = [each for each in left.get(text, ()) if each not in taken]
        new = dict(zip([each for each in ids if each not in pairs], free, strict=False))
        pairs.update(new)
        taken |= set(new.values())
    ordered = sorted(pairs.items())
    return Shared([pair[0] for pair in ordered], [pair[1] for pair in ordered])


def special_pairs(own: Pieces, other: Pieces) -> tuple[list[int], list[int]]:
    """The special tokens of two tokenizers that mean the same: the ends of documents, and those of one name."""
    pairs: dict[int, int] = {}
    ends = document_end(own.tokenizer), document_end(other.tokenizer)
    begins = own.tokenizer.bos_token_id, other.tokenizer.bos_token_id
    for first, second in (ends, begins):
        if first is not None and second is not None and first not in pairs and second not in pairs.values():
            pairs[first] = second
    named = {other.names[token]: token for token in other.special if token in other.names}
    for token in sorted(own.special):
        there = named.get(own.names.get(token, ""))
        if there is not None and token not in pairs and there not in pairs.values():
            pairs[token] = there
    return [*pairs], [*pairs.values()]


def _by_text(pieces: Pieces) -> dict[tuple[bytes, bool], list[int]]:
    """The tokens that are text, by their bytes and whether they stand for one byte; in the order of their ids."""
    found: dict[tuple[bytes, bool], list[int]] = {}
    for token in sorted(pieces.names):
        if token not in pieces.special and (text := pieces.of(token)):
            found.setdefault((text, pieces.is_byte(token)), []).append(token)
    return found


def _decoders(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """The kinds of decoders that a fast tokenizer is put together from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    found: set[str] = set()
    waiting: list[Any] = [] if backend is None else [json.loads(backend.to_str())["decoder"]]
    while waiting:
        if (decoder := waiting.pop()) is not None:
            found.add(decoder["type"])
            waiting += decoder.get("decoders", ())
    return found


def _alphabet() -> dict[str, int]:
    """The letter that byte-level tokenizers (GPT-2's, Radford et al., 2019) write for each byte: itself where it can be seen."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _alphabet()
