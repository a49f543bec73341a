"""Batches of changed rows: which rows and words change depends on the rows, the seed and the epoch alone."""

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.augmenting.settings import Augment, Spans
from distill_llm.data.augmenting.words import Spots, Words
from distill_llm.data.draws import row_generator
from distill_llm.data.epochs import Epoch
from distill_llm.data.padding import Collator, Features
from distill_llm.losses.labels import IGNORED

CANDIDATES = "candidates"
"""A column: the words that may replace each word of a row, one list after the other (see `models.candidates`)."""
COUNTED = "augmented"
"""A column of batches, (B, 3): whether a row was changed, its changed tokens, and its tokens before."""
USE = 1  # of a row's random numbers; masks have 0


class _Changed(NamedTuple):
    """A row that was changed, how many of its tokens were, and, if it is mixed, with what and the row's own share."""

    row: dict[str, Any]
    counted: tuple[int, int, int]
    partner: dict[str, Any] | None = None
    share: float = 1.0


class AugmentingCollator:
    """Changes a share of the rows of every epoch, and makes batches by another collator.

    What is drawn for a row depends on its tokens, the seed and the epoch: on no batch, process or worker, and nothing has to
    be saved to resume. Without an epoch, as in an evaluation, rows stay as they are.

    Words replaced: a word gives its place to one of its candidates, which is a single token (TinyBERT, Jiao et al., 2020,
    algorithm 1). Back-off: the words of a run give theirs to words drawn by their frequency in all rows (unigram noising, Xie
    et al., 2017). Cut-out: no model may look at the tokens of a run, and their places stay (token and span cutoff, Shen et al.,
    2020, which sets their embeddings to 0 instead). Mixup: the embeddings of the row and of any other row, each zero beyond its
    own end, are added in shares of l and 1 - l (wordMixup, Guo et al., 2019; MixKD, Liang et al., 2021); the mixture is as long
    as the longer row, and so is its mask.

    Args:
        plain: makes batches of rows.
        rows: all training rows, encoded, of which partners and frequencies are taken. To replace words they need the column
            CANDIDATES.
        tokenizer: of the rows.
        settings: what is done.
        seed: of the draws.

    Attributes:
        columns: of the rows, that it reads besides those of the models.

    Raises:
        InputError: words are to be replaced, and the rows have no candidates.
    """

    def __init__(
        self, plain: Collator, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: Augment, seed: int = 0
    ):
        self.plain, self.rows, self.settings, self.seed = plain, rows, settings, seed
        self.words = Words(tokenizer)
        self.epoch: Epoch | None = None
        self.columns = (CANDIDATES,) if settings.replace else ()
        if settings.replace and CANDIDATES not in rows.column_names:
            fix = "give rows with the column candidates (distill_llm.models.candidates.WordSource.add_to)"
            raise InputError("rows", ", ".join(rows.column_names), fix=fix)
        self.frequent = _frequencies(rows, self.words) if settings.backoff else np.empty((2, 0))

    @property
    def mixes(self) -> bool:
        """Whether batches hold mixed examples."""
        return self.settings.mixup is not None

    def at(self, epoch: Epoch) -> "AugmentingCollator":
        """A copy that follows the epochs of a training."""
        other = copy.copy(self)
        other.epoch = epoch
        return other

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """One batch, with COUNTED; where a row of it is mixed, with the columns of `mixture` besides."""
        if self.epoch is None:
            return self.plain([_without(row) for row in features])
        made = [self._changed(row, self.epoch.number) for row in features]
        rows = [each.row for each in made]
        if any(each.partner is not None for each in made):
            both = self.plain(rows + [each.row if each.partner is None else each.partner for each in made])
            mixed = torch.tensor([each.partner is not None for each in made])
            batch = mixture(both, mixed, torch.tensor([each.share for each in made]))
        else:
            batch = self.plain(rows)
        return {**batch, COUNTED: torch.tensor([each.counted for each in made])}

    def _changed(self, given: Mapping[str, Any], epoch: int) -> _Changed:
        row, do = _without(given), self.settings
        tokens = len(row["input_ids"])
        row.setdefault("attention_mask", [1] * tokens)
        draws = row_generator(np.asarray(row["input_ids"]), self.seed, epoch, USE)
        if draws.random() >= do.share:
            return _Changed(row, (0, 0, tokens))
        changed = 0
        if do.replace is not None:
            spots = self.words.spots(np.asarray(row["input_ids"]))
            choices = np.asarray(given[CANDIDATES], dtype=np.int64).reshape(len(spots.starts), -1)
            chosen = draws.random(len(choices)) < do.replace.share
            picks = draws.random(len(choices))
            lengths = (choices >= 0).sum(-1)  # of a word with fewer candidates the rest is -1
            words = choices[np.arange(len(choices)), (picks * lengths).astype(np.int64)] if choices.size else lengths
            changed += _replace(row, spots, chosen & (lengths > 0), words)
        if do.backoff is not None:
            spots = self.words.spots(np.asarray(row["input_ids"]))
            drawn = np.searchsorted(self.frequent[1], draws.random(len(spots.starts)), side="right")
            words = self.frequent[0][drawn].astype(np.int64)
            changed += _replace(row, spots, _runs(draws, len(spots.starts), do.backoff), words)
        if do.cutout is not None:
            changed += self._cut_out(row, draws, do.cutout)
        if not do.keep_labels and "labels" in row:
            row["labels"] = IGNORED
        if do.mixup is None or len(self.rows) < 2:
            return _Changed(row, (int(changed > 0), min(changed, tokens), tokens))
        found = self.rows[int(draws.integers(len(self.rows)))]
        partner = {name: found.get(name, values) for name, values in row.items()}
        partner["attention_mask"] = found.get("attention_mask", [1] * len(found["input_ids"]))
        if not do.keep_labels and "labels" in partner:
            partner["labels"] = IGNORED
        return _Changed(row, (1, tokens, tokens), partner, float(draws.beta(do.mixup.alpha, do.mixup.alpha)))

    def _cut_out(self, row: dict[str, Any], draws: np.random.Generator, spans: Spans) -> int:
        """Hide runs of tokens, but no special ones, nor all that a model sees; returns how many."""
        ids, mask = np.asarray(row["input_ids"]), np.array(row["attention_mask"])
        places = np.flatnonzero((mask == 1) & ~self.words.special[ids])
        hidden = places[_runs(draws, len(places), spans)]
        if len(hidden) == mask.sum():
            hidden = hidden[1:]
        mask[hidden] = 0
        row["attention_mask"] = mask.tolist()
        return len(hidden)


def mixture(both: Mapping[str, Tensor], mixed: Tensor, shares: Tensor) -> dict[str, Tensor]:
    """A batch of B rows, some of them mixed with others.

    Args:
        both: a padded batch of the rows, and then of their partners: 2 B rows.
        mixed: (B,) of bool, which of the rows are mixed.
        shares: (B,) of a row itself in its mixture.

    Returns:
        The batch, whose mask and tokens are those of either row where there are any, and `mixed_ids` (B, T), the partners'
        tokens, `mixed_shares` (B, T, 2), the factors of the embeddings of `input_ids` and of `mixed_ids`; where there are
        labels, `mixed_labels` (B,), the partners', and `mixed_share` (B,), the row's own share.
    """
    count = len(mixed)
    own, other = ({name: each[part] for name, each in both.items()} for part in (slice(count), slice(count, None)))
    here, there = own["attention_mask"].bool(), other["attention_mask"].bool() & mixed[:, None]
    alone = there & ~here
    batch = {
        name: torch.where(alone, other[name], each) if each.shape == here.shape else each for name, each in own.items()
    }
    share = torch.where(mixed, shares, torch.ones_like(shares)).float()
    rest = (1 - share)[:, None].expand(here.shape)
    first = torch.where(alone, rest, share[:, None])
    batch |= {"mixed_ids": other["input_ids"], "mixed_shares": torch.stack([first, rest * (here & there)], -1)}
    if "labels" in own:
        batch |= {"mixed_labels": other["labels"], "mixed_share": share}
    return batch


def _without(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without its candidates."""
    return {name: values for name, values in row.items() if name != CANDIDATES}


def _runs(draws: np.random.Generator, count: int, spans: Spans) -> np.ndarray:
    """(count,) of bool: runs that begin anywhere, at least one."""
    start = draws.random(count)
    begins = np.flatnonzero(start <= max(spans.share / spans.length, start.min(initial=1)))
    chosen = np.zeros(count, dtype=bool)
    for begin in begins.tolist():
        chosen[begin : begin + spans.length] = True
    return chosen


def _replace(row: dict[str, Any], spots: Spots, chosen: np.ndarray, words: np.ndarray) -> int:
    """Put a token in the place of each chosen word, whatever its number of pieces; returns how many pieces went.

    Args:
        chosen: (W,) of bool.
        words: (W,) tokens.
    """
    ids, keep = np.array(row["input_ids"]), np.ones(len(row["input_ids"]), dtype=bool)
    starts, ends = spots.starts[chosen], spots.ends[chosen]
    ids[starts] = words[chosen]
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        keep[start + 1 : end] = False
    for name, values in {**row, "input_ids": ids}.items():
        if np.ndim(values) == 1 and len(values) == len(keep):
            row[name] = np.asarray(values)[keep].tolist()
    return int((ends - starts).sum())


def _frequencies(rows: Dataset, words: Words) -> np.ndarray:
    """(2, n): the tokens that are whole words and occur in the rows, and the sum of the shares up to each."""
    counts = np.zeros(len(words.first), dtype=np.int64)
    for part in rows.select_columns("input_ids").with_format("numpy").iter(batch_size=1000):
        for ids in part["input_ids"]:
            np.add.at(counts, np.asarray(ids), 1)
    counts[~(words.written & words.first)] = 0
    tokens = np.flatnonzero(counts)
    total = np.cumsum(counts[tokens], dtype=np.float64)
    return np.stack([tokens.astype(np.float64), total / total[-1]]) if len(tokens) else np.empty((2, 0))
