"""Pearson correlation, as a metric module of `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Linear correlation between predicted and true values."
CITATION = "Pearson, Notes on regression and inheritance in the case of two parents, 1895"
INPUTS = """
Args:
    predictions: real values, one per example.
    references: real values of the same length.
Returns:
    pearsonr: between -1 and 1; 0 where one side is constant.
"""


class Pearson(evaluate.Metric):
    """Linear correlation between predicted and true values."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("float64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        a, b = (values - np.mean(values) for values in (np.asarray(predictions), np.asarray(references)))
        spread = float(np.sqrt(np.sum(a * a) * np.sum(b * b)))
        return {"pearsonr": float(np.sum(a * b)) / spread if spread > 0 else 0.0}
