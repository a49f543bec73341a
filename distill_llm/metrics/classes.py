"""Metrics of class ids, by scikit-learn."""

from typing import Any

from distill_llm.metrics.registry import metric


@metric("classes", is_share=True)
def accuracy(predictions: Any, references: Any) -> float:
    """Share of the predictions that equal their reference."""
    from sklearn.metrics import accuracy_score

    return accuracy_score(references, predictions)


@metric("classes", is_share=True, of_truth=False)
def agreement(predictions: Any, references: Any) -> float:
    """Share of the predictions that equal those of another model, its teacher: `accuracy` where references are no truth."""
    return accuracy(predictions, references)


@metric("classes")
def f1(predictions: Any, references: Any, num_labels: int) -> float:
    """Harmonic mean of precision and recall: of class 1 for two classes, else the mean over the classes that occur.

    0 for a class that is never predicted rightly.
    """
    from sklearn.metrics import f1_score

    average = "macro" if num_labels > 2 else "binary"
    return f1_score(references, predictions, average=average, zero_division=0)


@metric("classes")
def matthews_correlation(predictions: Any, references: Any) -> float:
    """Correlation between predicted and true classes (Matthews, 1975; several classes: Gorodkin, 2004).

    0 where one side has a single class.
    """
    from sklearn.metrics import matthews_corrcoef

    return matthews_corrcoef(references, predictions)
