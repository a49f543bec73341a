"""Naive answers, and the warning where a model does no better."""

import pytest
from datasets import Dataset
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.metrics import f1_score
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import make_pipeline

from distill_llm.data.glue import GLUE
from distill_llm.data.kinds.causal_lm import causal_lm
from distill_llm.data.kinds.classification import classification
from distill_llm.evaluation.baselines import baselines, no_better

TRAIN = {
    "text": ["good film", "bad film", "a good one", "so bad", "good good", "not bad at all"],
    "labels": [1, 0, 1, 0, 1, 0],
}
TEST = {"text": ["good plot", "bad plot", "bad bad", "good"], "labels": [1, 0, 0, 0]}
TASK = classification("own", ("text",), ("no", "yes"), ("f1", "accuracy"))


def rows(columns, **changes):
    return Dataset.from_dict({**columns, **changes})


def test_classes_have_the_most_frequent_one_and_naive_bayes_on_words():
    found = baselines(TASK, rows(TRAIN, labels=[1, 0, 1, 0, 1, 1]), rows(TEST))
    wanted = make_pipeline(CountVectorizer(binary=True, ngram_range=(1, 2)), MultinomialNB())
    wanted.fit(TRAIN["text"], [1, 0, 1, 0, 1, 1])
    assert found == {
        "the most frequent class": pytest.approx(2 * 1 / (2 * 1 + 3)),  # all are `yes`: one is right, three are not
        "naive Bayes on words": pytest.approx(f1_score(TEST["labels"], wanted.predict(TEST["text"]))),
    }


def test_without_training_rows_the_test_rows_own_class_counts_and_texts_without_words_have_no_bayes():
    accuracy = classification("own", ("text",), ("no", "yes"))
    assert baselines(accuracy, None, rows(TEST)) == {"the most frequent class": 0.75}
    assert baselines(accuracy, rows(TRAIN, text=["!"] * 6), rows(TEST)).keys() == {"the most frequent class"}


def test_the_mean_ranks_nothing_and_language_models_have_no_naive_answer():
    pairs = Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "labels": [1.0, 3.0]})
    assert baselines(GLUE["stsb"], pairs, pairs) == {"the mean": 0.0}
    assert baselines(causal_lm("text", "text"), rows(TRAIN), rows(TEST)) == {}


def test_a_long_data_set_is_read_in_part():
    many = rows({"text": ["good", "bad"] * 6000 + ["good " * 400_000] * 8, "labels": [1, 0] * 6000 + [1] * 8})
    assert baselines(classification("own", ("text",), ("no", "yes")), many, rows(TEST))["naive Bayes on words"] == 0.75


@pytest.mark.parametrize(
    ("score", "warned"), [(0.5, True), (0.8, True), (0.8001, False)], ids=["worse", "the same", "better"]
)
def test_a_model_that_is_no_better_is_warned_about_with_both_scores(score, warned):
    naive = {"the most frequent class": 0.6, "naive Bayes on words": 0.8}
    line = no_better(TASK, {"score": score, "standard_error": 0.02}, naive)
    assert (line is not None) == warned
    assert not warned or (
        f"f1 {score:.4f} ± 0.0200, against 0.8000" in line and "naive Bayes on words" in line and "no=0, yes=1" in line
    )
    assert no_better(TASK, {"score": 0.0}, {}) is None
