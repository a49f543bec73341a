"""Spearman correlation, as a metric module of `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Correlation between the ranks of predicted and true values; equal values share their mean rank."
CITATION = "Spearman, The proof and measurement of association between two things, 1904"
INPUTS = """
Args:
    predictions: real values, one per example.
    references: real values of the same length.
Returns:
    spearmanr: between -1 and 1; 0 where one side is constant.
"""


class Spearman(evaluate.Metric):
    """Correlation between the ranks of predicted and true values; equal values share their mean rank."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("float64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        def ranks(values: Any) -> np.ndarray:
            _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
            mean_rank = np.cumsum(counts) - (counts - 1) / 2
            return mean_rank[place] - mean_rank[place].mean()

        a, b = ranks(predictions), ranks(references)
        spread = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
        return {"spearmanr": float(np.sum(a * b)) / spread if spread > 0 else 0.0}
