"""Where words begin and end in a row of token ids, and which tokens of a vocabulary are whole words."""

from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

CONTINUES = "##"
"""With it WordPiece begins pieces inside of a word."""
BEGINS = ("Ġ", "▁")
"""With one of these other tokenizers begin the first piece of a word."""
MANY = 0.01
"""A mark is a tokenizer's own if so many of its tokens have it."""


class Spots(NamedTuple):
    """The words of a row: where each begins, and where it ends, both (W,)."""

    starts: np.ndarray
    ends: np.ndarray


class Words:
    """What a vocabulary says of words.

    A word is a run of pieces with letters or digits; punctuation and special tokens are none. A token is a whole word if it
    can stand alone where it does. In a vocabulary without marks every token is a word.

    Args:
        tokenizer: of the rows.

    Attributes:
        special, written, first: (V,) of bool by token: whether it is special, has letters or digits, begins a word.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        names = {number: name for name, number in tokenizer.get_vocab().items()}
        size = max(names) + 1
        texts = [names.get(number, "") for number in range(size)]
        self.special = np.zeros(size, dtype=bool)
        self.special[sorted(tokenizer.all_special_ids)] = True
        self.written = np.array([any(map(str.isalnum, text)) for text in texts]) & ~self.special
        counts = {mark: sum(text.startswith(mark) for text in texts) for mark in (CONTINUES, *BEGINS)}
        mark = max(counts, key=lambda each: counts[each])
        self.first = np.ones(size, dtype=bool)
        self.marked = np.zeros(size, dtype=bool)
        if counts[mark] > MANY * size:
            has = np.array([text.startswith(mark) for text in texts])
            self.first, self.marked = (~has, self.marked) if mark == CONTINUES else (has, has)

    def spots(self, ids: np.ndarray) -> Spots:
        """The words of a row of ids (T,)."""
        written = self.written[ids]
        before = np.concatenate([[False], written[:-1]])
        starts = np.flatnonzero(written & (self.first[ids] | ~before))
        inside = written & ~self.first[ids] & before
        ends = np.array([start + 1 + _run(inside[start + 1 :]) for start in starts.tolist()], dtype=np.int64)
        return Spots(starts, ends)

    def like(self, token: int) -> np.ndarray:
        """(V,) of bool: the whole words that can stand where a word begins with this token.

        Where a tokenizer marks beginnings, the first word of a text may have no mark; then no other one gets any.
        """
        if not self.marked.any():
            return self.written & self.first
        return self.written & (self.marked == self.marked[token])


def _run(flags: np.ndarray) -> int:
    """How many flags in a row are set, from the first one on."""
    unset = np.flatnonzero(~flags)
    return int(unset[0]) if len(unset) else len(flags)
