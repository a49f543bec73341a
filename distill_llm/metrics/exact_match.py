"""Exact match of texts, as a metric module of `evaluate`."""

from typing import Any

import datasets
import evaluate

DESCRIPTION = "Share of the texts that equal their reference, but for white space at their ends."
CITATION = ""
INPUTS = """
Args:
    predictions: texts, one per example.
    references: texts, as many.
Returns:
    exact_match: between 0 and 1.
"""


class ExactMatch(evaluate.Metric):
    """Share of the texts that equal their reference, but for white space at their ends."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        equal = [one.strip() == other.strip() for one, other in zip(predictions, references, strict=True)]
        return {"exact_match": sum(equal) / len(equal)}
