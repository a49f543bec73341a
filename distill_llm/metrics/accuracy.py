"""Accuracy, as a metric module of `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Share of the predictions that equal their reference."
CITATION = ""
INPUTS = """
Args:
    predictions: class ids, one per example.
    references: class ids of the same length.
Returns:
    accuracy: between 0 and 1.
"""


class Accuracy(evaluate.Metric):
    """Share of the predictions that equal their reference."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
