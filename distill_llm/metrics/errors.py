"""How far a score may be off because the rows that it was measured on are a sample: its standard error."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from distill_llm.common.errors import InputError
from distill_llm.metrics.registry import Metric

RESAMPLES, SEED = 100, 0
MOST = 5000
"""Items of a resample: more cost time, and the error of fewer says what theirs is."""


def standard_error(
    metric: Metric, score: float, predictions: Any, references: Any, num_labels: int = 1
) -> float | None:
    """The standard error of a metric's value.

    A share p of n items has sqrt(p (1 - p) / n). Other metrics are computed on resamples, drawn with replacement and a fixed
    seed (the bootstrap: Efron and Tibshirani, 1993, chapter 6). Of more than 5,000 items each resample has 5,000, and the
    spread is scaled by sqrt(5,000 / n).

    Args:
        metric: of METRICS.
        score: its value on these items.
        predictions, references: (items,) each.
        num_labels: how many classes there are.

    Returns:
        None for fewer than two items, and where the metric is undefined on most resamples.
    """
    items = len(references)
    if items < 2:
        return None
    if metric.is_share:
        return math.sqrt(max(0.0, score * (1 - score)) / items)
    generator, size = np.random.default_rng(SEED), min(items, MOST)
    values = []
    for _ in range(RESAMPLES):
        drawn = generator.integers(items, size=size)
        try:
            values.append(metric(_at(predictions, drawn), _at(references, drawn), num_labels))
        except (InputError, ValueError):  # a metric of one's own may need every class
            continue
    if len(values) < RESAMPLES / 2:
        return None
    return float(np.std(values, ddof=1) * math.sqrt(size / items))


def ratio_error(sums: np.ndarray, counts: np.ndarray) -> float | None:
    """The standard error of sum(sums) / sum(counts), such as a mean over the tokens of rows (Cochran, 1977, 6.3).

    Tokens of one row are not independent, so that rows are the sample.

    Args:
        sums, counts: (rows,) what each row adds to both sums.
    """
    rows = len(sums)
    if rows < 2:
        return None
    left = sums - counts * (sums.sum() / counts.sum())
    return float(math.sqrt(rows / (rows - 1) * np.square(left).sum()) / counts.sum())


def shown_score(metrics: Mapping[str, Any], score: float | None = None) -> str:
    """A score with its standard error, if that is known: `0.8727 ± 0.0113`.

    Args:
        metrics: with `score`, and perhaps `standard_error`.
        score: in place of the metrics' own.
    """
    error, score = metrics.get("standard_error"), metrics["score"] if score is None else score
    return f"{score:.4f}" if error is None else f"{score:.4f} ± {error:.4f}"


def _at(values: Sequence[Any], places: np.ndarray) -> Any:
    return values[places] if isinstance(values, np.ndarray) else [values[place] for place in places]
