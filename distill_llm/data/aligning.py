"""One text as the tokens of two tokenizers: where both begin a token, chunks of it can be compared."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.pieces import Pieces, Shared, shared_tokens, special_pairs
from distill_llm.data.special_tokens import document_end, special_ends, token_rules

Span = tuple[int, int]


class Chunk(NamedTuple):
    """A stretch of text that both tokenizers cut out: places of its tokens, [first, last), in each sequence.

    `same`: it is one token on both sides, and the same bytes. `characters`: of the text; 0 of a special token, and of one that
    goes on in a character.
    """

    own: Span
    other: Span
    same: bool
    characters: int


@dataclass
class Aligned:
    """A sequence in the tokens of both tokenizers.

    Attributes:
        ids: of the other tokenizer.
        chunks: in order; tokens that are in none have no counterpart.
        characters: of the whole text.
    """

    ids: list[int] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    characters: int = 0


class _Text(NamedTuple):
    """Neighbouring tokens that are text.

    Attributes:
        first: place of the first token.
        ids: of the tokens.
        text: what they are; a byte that is no part of a character is a surrogate.
        spans: of each token, in characters.
    """

    first: int
    ids: list[int]
    text: str
    spans: list[Span]


class Aligner:
    """Turns sequences of one tokenizer into those of another.

    The text of the tokens is tokenized anew. Where the first tokenizer's sequence ends a document, the other's gets its own
    end; its own begin of a text stands at the beginning and behind each end. Special tokens with a counterpart are that;
    others are left out.

    Args:
        own: of the sequences.
        other: a fast one, which says which characters its tokens cover.

    Raises:
        InputError: `teacher.tokenizer`, the other one is not fast.
    """

    def __init__(self, own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase):
        if not other.is_fast:
            raise InputError("teacher.tokenizer", type(other).__name__, "a fast tokenizer (with a tokenizer.json)")
        self.tokenizers = own, other
        self.pieces = Pieces(own), Pieces(other)
        self.begins = special_ends(own)[0], special_ends(other)[0]
        self.ends = document_end(own), document_end(other)
        self.special = dict(zip(*special_pairs(*self.pieces), strict=True))
        self.alike = token_rules(own) == token_rules(other) and own.special_tokens_map == other.special_tokens_map

    @cached_property
    def shared(self) -> Shared:
        """Tokens of both tokenizers with the same text; reads both vocabularies."""
        return shared_tokens(*self.pieces)

    @cached_property
    def _counterparts(self) -> dict[int, int]:
        return dict(zip(*self.shared, strict=True))

    def unknown(self, ids: Sequence[int]) -> list[str]:
        """Special tokens among `ids` that the other tokenizer has no counterpart of."""
        dropped = {*self.begins[0], self.tokenizers[0].unk_token_id, self.tokenizers[0].pad_token_id}
        found = dict.fromkeys(each for each in ids if each in self.pieces[0].special)
        return [self.pieces[0].names[each] for each in found if each not in self.special and each not in dropped]

    def __call__(self, sequences: Sequence[Sequence[int]]) -> list[Aligned]:
        """Sequences of token ids, each with its counterpart."""
        if self.alike:
            return [self._as_they_are(ids) for ids in sequences]
        parts = [[*self._parts(ids)] for ids in sequences]
        texts = [part for row in parts for part in row if isinstance(part, _Text)]
        encoded = self._encoded([part.text for part in texts])
        return [self._joined(row, encoded) for row in parts]

    def _as_they_are(self, ids: Sequence[int]) -> Aligned:
        lengths = [0 if each in self.pieces[0].special else len(self.pieces[0].of(each)) for each in ids]
        chunks = [Chunk((at, at + 1), (at, at + 1), True, length) for at, length in enumerate(lengths)]
        return Aligned([*ids], chunks, sum(lengths))

    def _parts(self, ids: Sequence[int]) -> "Iterator[_Text | tuple[int, int]]":
        """Stretches of text, and single special tokens as (place, id); what begins documents is left out."""
        at, begins, begin = 0, True, self.begins[0]
        while at < len(ids):
            if begins and begin and [*ids[at : at + len(begin)]] == begin:
                at, begins = at + len(begin), False
                continue
            last = at
            while last < len(ids) and ids[last] not in self.pieces[0].special:
                last += 1
            if last > at:
                yield self._text(at, [*ids[at:last]])
                begins = False
            else:
                last, begins = at + 1, ids[at] == self.ends[0]
                yield at, ids[at]
            at = last

    def _text(self, first: int, ids: list[int]) -> _Text:
        pieces = [self.pieces[0].of(each, first=not place) for place, each in enumerate(ids)]
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        owner: list[int] = []  # of each byte, the character that it is a part of
        for place, letter in enumerate(text):
            owner += [place] * len(letter.encode("utf-8", "surrogateescape"))
        owner.append(len(text))
        spans, at = [], 0
        for piece in pieces:
            last = owner[at + len(piece) - 1] + 1 if piece else owner[at]
            spans.append((owner[at], last))
            at += len(piece)
        return _Text(first, ids, text, spans)

    def _encoded(self, texts: list[str]) -> "Iterator[tuple[list[int], list[Span]]]":
        """Ids and spans of the other tokenizer, in which a special token that is spelled out in a text stays text."""
        if not texts:
            return iter(())
        clean = ["".join("\ufffd" if _is_broken(each) else each for each in text) for text in texts]
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        found = self.tokenizers[1](clean, return_offsets_mapping=True, **options)
        return iter([*zip(found["input_ids"], map(_without_gaps, found["offset_mapping"]), strict=True)])

    def _joined(
        self, parts: "list[_Text | tuple[int, int]]", encoded: "Iterator[tuple[list[int], list[Span]]]"
    ) -> Aligned:
        made, begins = Aligned(), True
        for part in parts:
            fresh = begins
            if begins:
                made.ids += self.begins[1]
                begins = False
            if isinstance(part, _Text):
                ids, spans = next(encoded)
                made.chunks += self._chunks(part, ids, spans, len(made.ids))
                made.characters += len(part.text)
                made.ids += ids
                continue
            begins = part[1] == self.ends[0]
            there = self.special.get(part[1])
            if there is not None and not (fresh and [there] == self.begins[1]):  # it begins the text already
                made.chunks.append(Chunk((part[0], part[0] + 1), (len(made.ids), len(made.ids) + 1), True, 0))
                made.ids.append(there)
        return made

    def _chunks(self, part: _Text, ids: list[int], spans: list[Span], before: int) -> Iterator[Chunk]:
        """The chunks of a stretch of text whose tokens in the other sequence come behind `before` others."""
        own, other = (_borders(each, len(part.text)) for each in (part.spans, spans))
        common = sorted(own.keys() & other.keys())
        for start, end in pairwise(common):
            (first, last), (there, until) = (own[start], own[end]), (other[start], other[end])
            if last == first or until == there or any(map(_is_broken, part.text[start:end])):
                continue
            if [self._counterparts.get(each) for each in part.ids[first:last]] == ids[there:until]:
                # Token by token the same; of several, as the bytes of one character are, the first has the characters.
                for at in range(last - first):
                    one, two = part.first + first + at, before + there + at
                    yield Chunk((one, one + 1), (two, two + 1), True, 0 if at else end - start)
            else:
                places = (part.first + first, part.first + last), (before + there, before + until)
                yield Chunk(*places, False, end - start)


def _is_broken(letter: str) -> bool:
    """Whether a character stands for a byte that is no part of one."""
    return "\udc80" <= letter <= "\udcff"


def _without_gaps(spans: Sequence[Span]) -> list[Span]:
    """Spans in which each token begins where those before it end: spaces, or what else is between, belong to the next."""
    found, end = [], 0
    for start, last in spans:
        found.append((min(start, end), max(last, end)))
        end = max(end, last)
    return found


def _borders(spans: Sequence[Span], length: int) -> dict[int, int]:
    """Where in the text a token begins and no other is under way: by character, the first token from there on."""
    found: dict[int, int] = {}
    end = 0
    for number, (start, last) in enumerate(spans):
        if end <= start:
            found.setdefault(start, number)
        end = max(end, last)
    found.setdefault(end, len(spans))
    found[length] = found.get(length, len(spans))
    return found
