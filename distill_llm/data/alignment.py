"""How much of a text two tokenizers cut alike, told before a training that depends on it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distill_llm.data.aligning import Aligner

ROWS = 100
"""Rows that are looked at, the first ones."""


@dataclass(frozen=True)
class Alignment:
    """Numbers of some rows.

    Attributes:
        rows: looked at.
        tokens: of the student in these rows, without the tokens that begin a document.
        exact_tokens: of them, those that are one token of the same text for the teacher.
        merged_tokens: those in chunks of several tokens, or of one token that is written in another way.
        characters, exact_characters: of their text.
        shared: tokens of the same text in both vocabularies.
        vocabulary: tokens of the student's vocabulary.
    """

    rows: int
    tokens: int
    exact_tokens: int
    merged_tokens: int
    characters: int
    exact_characters: int
    shared: int
    vocabulary: int

    def __str__(self) -> str:
        """One line for the user."""
        return alignment_words(asdict(self))


def alignment_words(found: Mapping[str, Any]) -> str:
    """An `Alignment`, as a mapping, in words."""
    tokens, characters = max(found["tokens"], 1), max(found["characters"], 1)
    left = found["tokens"] - found["exact_tokens"] - found["merged_tokens"]
    return (
        f"{found['exact_tokens'] / tokens:.0%} of the student's tokens ({found['exact_characters'] / characters:.0%} of the"
        f" characters) are tokens of the teacher too, {found['merged_tokens'] / tokens:.0%} are in longer chunks,"
        f" {left / tokens:.0%} have no counterpart ({found['rows']} rows; the tokenizers share {found['shared']:,} of the"
        f" student's {found['vocabulary']:,} tokens)"
    )


def alignment_of(aligner: Aligner, rows: Sequence[Sequence[int]]) -> Alignment:
    """How sequences of the student's tokens are cut by the teacher's tokenizer."""
    made = aligner(rows)
    chunks = [chunk for each in made for chunk in each.chunks]
    begin = aligner.begins[0]
    begins = sum(len(begin) for ids in rows if begin and [*ids[: len(begin)]] == begin and not aligner.alike)
    widths = {same: sum(c.own[1] - c.own[0] for c in chunks if c.same == same) for same in (True, False)}
    return Alignment(
        rows=len(rows),
        tokens=sum(map(len, rows)) - begins,
        exact_tokens=widths[True],
        merged_tokens=widths[False],
        characters=sum(each.characters for each in made),
        exact_characters=sum(chunk.characters for chunk in chunks if chunk.same),
        shared=len(aligner.shared.own),
        vocabulary=len(aligner.pieces[0].names),
    )


def marks_without_counterpart(aligner: Aligner, rows: Iterable[Sequence[int]]) -> list[str]:
    """Special tokens in sequences of the student's tokens that the teacher's tokenizer does not have."""
    return [] if aligner.alike else [*dict.fromkeys(mark for ids in rows for mark in aligner.unknown(ids))]
