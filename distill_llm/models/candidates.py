"""Words that may stand in the place of others: the likeliest of a masked LM, and the nearest of word vectors."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.data.augmenting.collator import CANDIDATES
from distill_llm.data.augmenting.words import Words
from distill_llm.data.encoding import mapped
from distill_llm.data.padding import PaddingCollator, Rows
from distill_llm.data.special_tokens import tokenizer_state
from distill_llm.data.unlearnable import NUMBER
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.item_logits import item_logits, packed

FORMAT = 1
AT_ONCE = 64
"""Rows that a masked LM reads at once, and words whose neighbours are looked for at once."""


@dataclass(frozen=True)
class WordSource:
    """Where the candidates of words come from (TinyBERT, Jiao et al., 2020, algorithm 1).

    A word that is one piece is masked, alone, and the likeliest words of the masked LM in its place are its candidates.
    For a word of several pieces, and for all words where there is no masked LM, they are the words whose embeddings have the
    smallest angle to the word's, a mean over its pieces. A candidate is one piece, and another word than the one that is there.

    Attributes:
        tokenizer: of the rows.
        embeddings: (V, H) of a model with this tokenizer.
        count: of candidates, at most.
        masked_lm: with this tokenizer, on the device where it is to run; or None.
        identity: of embeddings and masked LM, for the cache.
    """

    tokenizer: PreTrainedTokenizerBase
    embeddings: torch.Tensor
    count: int
    masked_lm: PreTrainedModel | None
    identity: Sequence[Any]

    def add_to(self, rows: Dataset) -> Dataset:
        """The encoded rows with the column CANDIDATES: `count` tokens for each word of a row, the last -1 where there are
        fewer. It is kept in the cache folder of `datasets`: a masked LM reads a row once for every word."""
        identity = [*self.identity, *tokenizer_state(self.tokenizer), self.count, FORMAT, CANDIDATES]
        return mapped(rows, self._work, identity, "Finding words")

    @cached_property
    def _words(self) -> Words:
        return Words(self.tokenizer)

    @cached_property
    def _vectors(self) -> torch.Tensor:
        return normalize(self.embeddings.float(), dim=-1)

    def _work(self, columns: Rows) -> Rows:
        """The columns of some rows, and their candidates."""
        rows = [np.asarray(ids) for ids in columns["input_ids"]]
        spots = [self._words.spots(ids) for ids in rows]
        places = [
            (row, int(start), int(end))
            for row, found in enumerate(spots)
            for start, end in zip(found.starts, found.ends, strict=True)
        ]
        types = columns.get("token_type_ids")
        alone = [place for place in places if self.masked_lm is not None and place[2] - place[1] == 1]
        chosen = dict(self._predicted(rows, types, alone))
        others = [place for place in places if place not in chosen]
        names = {place: tuple(rows[place[0]][place[1] : place[2]].tolist()) for place in others}
        nearest = self._nearest(sorted({*names.values()}))
        chosen |= {place: nearest[name] for place, name in names.items()}
        made: list[list[int]] = [[] for _ in rows]
        for place in places:
            made[place[0]] += chosen[place]
        return {**{name: values for name, values in columns.items() if name != NUMBER}, CANDIDATES: made}

    def _predicted(
        self, rows: list[np.ndarray], types: list[Any] | None, places: list[tuple[int, int, int]]
    ) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
        """The candidates of words of one piece, each masked alone, rows of about one length at a time."""
        model, pad = self.masked_lm, PaddingCollator(self.tokenizer)
        if model is None:
            return
        places = sorted(places, key=lambda place: len(rows[place[0]]))
        for begin in range(0, len(places), AT_ONCE):
            part = places[begin : begin + AT_ONCE]
            masked = []
            for row, start, _ in part:
                ids = rows[row].copy()
                ids[start] = self.tokenizer.mask_token_id
                made = {"input_ids": ids, "attention_mask": np.ones_like(ids), "at": np.arange(len(ids)) == start}
                masked.append(made if types is None else {**made, "token_type_ids": np.asarray(types[row])})
            batch = {name: each.to(model.device) for name, each in pad(masked).items()}
            positions = batch.pop("at").flatten().nonzero().squeeze(-1)
            with torch.no_grad(), packed(model, positions):
                logits = item_logits(model(**forward_inputs(model, batch)).logits, positions).float().cpu()
            yield from zip(part, self._best(logits, [(int(rows[row][at]),) for row, at, _ in part]), strict=True)

    def _nearest(self, words: list[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
        """The candidates of words, which are given by their pieces, from their embeddings."""
        found: dict[tuple[int, ...], list[int]] = {}
        for begin in range(0, len(words), AT_ONCE):
            part = words[begin : begin + AT_ONCE]
            means = torch.stack([self.embeddings[list(word)].float().mean(0) for word in part])
            found |= zip(part, self._best(normalize(means, dim=-1) @ self._vectors.T, part), strict=True)
        return found

    def _best(self, scores: torch.Tensor, words: Sequence[tuple[int, ...]]) -> list[list[int]]:
        """The `count` best tokens of (items, V) scores that are whole words and not the item's own, then -1."""
        known = min(scores.shape[1], len(self._words.first))
        allowed = torch.from_numpy(np.stack([self._words.like(word[0])[:known] for word in words]))
        for row, word in enumerate(words):
            allowed[row, word[0]] &= len(word) > 1
        scores = scores[:, :known].masked_fill(~allowed, -torch.inf)
        best = scores.topk(min(self.count, known), dim=-1)
        tokens = best.indices.masked_fill(best.values == -torch.inf, -1)
        return torch.nn.functional.pad(tokens, (0, self.count - tokens.shape[1]), value=-1).tolist()
