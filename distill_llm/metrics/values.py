"""Metrics of real values, by scipy."""

from typing import Any

import numpy as np

from distill_llm.metrics.registry import metric


@metric("values")
def pearsonr(predictions: Any, references: Any) -> float:
    """Linear correlation between predicted and true values; 0 where one side is constant."""
    from scipy.stats import pearsonr

    return 0.0 if _constant(predictions) or _constant(references) else pearsonr(predictions, references).statistic


@metric("values")
def spearmanr(predictions: Any, references: Any) -> float:
    """Correlation between the ranks of predicted and true values; equal values share their mean rank.

    0 where one side is constant.
    """
    from scipy.stats import spearmanr

    return 0.0 if _constant(predictions) or _constant(references) else spearmanr(predictions, references).statistic


def _constant(values: Any) -> bool:
    """Whether all values are the same: a correlation with them is not defined."""
    return float(np.ptp(np.asarray(values))) == 0
