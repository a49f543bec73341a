"""Matthews correlation, as a metric module of `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Correlation between predicted and true classes, for two or more classes."
CITATION = "Matthews 1975; for several classes: Gorodkin, Comparing two K-category assignments, 2004"
INPUTS = """
Args:
    predictions: class ids, one per example.
    references: class ids of the same length.
Returns:
    matthews_correlation: between -1 and 1; 0 where one side has a single class.
"""


class MatthewsCorrelation(evaluate.Metric):
    """Correlation between predicted and true classes, for two or more classes."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        classes, ids = np.unique(np.concatenate([predictions, references]), return_inverse=True)
        predicted, meant = (np.eye(len(classes))[half] for half in np.split(ids, 2))

        def covariance(a: np.ndarray, b: np.ndarray) -> float:
            return float(np.sum((a - a.mean(0)) * (b - b.mean(0))))

        spread = covariance(predicted, predicted) * covariance(meant, meant)
        return {"matthews_correlation": covariance(predicted, meant) / spread**0.5 if spread > 0 else 0.0}
