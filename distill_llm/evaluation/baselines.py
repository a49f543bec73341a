"""Scores that need no model: a teacher that does no better was not trained on the task, or means other classes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from distill_llm.data.tasks import Task
from distill_llm.metrics.errors import shown_score
from distill_llm.metrics.registry import find_metric

MOST_TRAIN, MOST_TEST, MOST_CHARACTERS = 10_000, 20_000, 2_000
"""Rows to learn from, rows to score, and characters of a text: the baseline takes a second or two of any data."""
MOST_WORDS, SEED = 50_000, 0


def baselines(task: Task, train: Dataset | None, test: Dataset) -> dict[str, float]:
    """The main metric of naive answers to a task, by the name of each.

    Classes: always the most frequent one of the training rows, and naive Bayes on words and pairs of words. Values: always the
    mean. Language models, and tasks with several items in a row, have none.

    Args:
        train: raw rows; None: `test` is all there is, encoded or not, and its own most frequent class counts.
        test: the rows that models are scored on.
    """
    if task.kind.item != "example":
        return {}
    labels = np.asarray((train or test)["labels"][:])
    truth = np.asarray(test["labels"][:])
    found: dict[str, Any]
    if task.label_names is None:
        found = {"the mean": np.full(len(truth), labels.mean())}
    else:
        found = {"the most frequent class": np.full(len(truth), np.bincount(labels).argmax())}
        words = naive_bayes(task.text_columns, train, test) if train is not None else None
        found |= {} if words is None else {"naive Bayes on words": words}
    metric = find_metric(task.main_metric)
    return {name: metric(said, truth[: len(said)], task.num_labels) for name, said in found.items()}


def naive_bayes(columns: Sequence[str], train: Dataset, test: Dataset) -> np.ndarray | None:
    """The classes of the first test rows by multinomial naive Bayes; None where the texts have no words."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB

    if len(train) > MOST_TRAIN:
        train = train.select(np.random.default_rng(SEED).permutation(len(train))[:MOST_TRAIN])
    counter = CountVectorizer(ngram_range=(1, 2), binary=True, max_features=MOST_WORDS)
    try:
        counts = counter.fit_transform(_texts(train, columns))
    except ValueError:  # an empty vocabulary
        return None
    model = MultinomialNB().fit(counts, train["labels"][:])
    return model.predict(counter.transform(_texts(test.select(range(min(len(test), MOST_TEST))), columns)))


def _texts(rows: Dataset, columns: Sequence[str]) -> list[str]:
    parts = ([text[:MOST_CHARACTERS] for text in rows[column]] for column in columns)
    return [" ".join(texts) for texts in zip(*parts, strict=True)]


def no_better(
    task: Task, metrics: Mapping[str, Any], naive: Mapping[str, float], model: str = "the teacher"
) -> str | None:
    """A warning where a model's score is not better than a naive one; None where it is.

    Args:
        metrics: of the model, with its `score`.
        naive: of `baselines`.
        model: what the model is called.
    """
    sign = 1 if task.higher_is_better else -1
    name = max(naive, key=lambda name: sign * naive[name], default=None)
    if name is None or sign * metrics["score"] > sign * naive[name]:
        return None
    line = f"{model} is no better than {name}: {task.main_metric} {shown_score(metrics)}, against {naive[name]:.4f}"
    if task.label_names is None:
        return f"{line}. Was it trained on this task?"
    order = ", ".join(f"{name}={number}" for number, name in enumerate(task.label_names[:5]))
    return f"{line}. Was it trained on this task, with its classes in this order ({order})?"
