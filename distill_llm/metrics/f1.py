"""F1, as a metric module of `evaluate`."""

from typing import Any

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Harmonic mean of precision and recall, of one class or averaged over classes."
CITATION = "van Rijsbergen, Information Retrieval, 1979"
INPUTS = """
Args:
    predictions: class ids, one per example.
    references: class ids of the same length.
    average: `binary` for the F1 of class `pos_label`, `macro` for the mean over the classes that occur.
    pos_label: the positive class of `binary`.
Returns:
    f1: between 0 and 1; 0 for a class that is never predicted rightly.
"""


class F1(evaluate.Metric):
    """Harmonic mean of precision and recall, of one class or averaged over classes."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(
        self, predictions: Any, references: Any, average: str = "binary", pos_label: int = 1
    ) -> dict[str, float]:
        predicted, meant = np.asarray(predictions), np.asarray(references)
        if average not in ("binary", "macro"):
            raise ValueError(f"average: got {average!r}; accepted: 'binary', 'macro'")
        classes = [pos_label] if average == "binary" else np.union1d(predicted, meant)
        hits = [np.sum((predicted == c) & (meant == c)) for c in classes]
        total = [np.sum(predicted == c) + np.sum(meant == c) for c in classes]
        return {"f1": float(np.mean([2 * hit / max(count, 1) for hit, count in zip(hits, total, strict=True)]))}
