"""Standard errors of scores, against what repeated samples show."""

import math

import numpy as np
import pytest

from distill_llm.metrics import METRICS, metric
from distill_llm.metrics.errors import ratio_error, shown_score, standard_error


def test_the_error_of_a_share_is_that_of_a_binomial():
    right = [1] * 45 + [0] * 15
    assert standard_error(METRICS["accuracy"], 0.75, right, [1] * 60) == pytest.approx(math.sqrt(0.75 * 0.25 / 60))
    texts = ["a"] * 45 + ["b"] * 15
    assert standard_error(METRICS["exact_match"], 0.75, texts, ["a"] * 60) == pytest.approx(math.sqrt(0.75 * 0.25 / 60))


@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("spearmanr", 300),
        ("f1", 400),
        pytest.param("f1", 8000, marks=pytest.mark.slow),
        pytest.param("matthews_correlation", 400, marks=pytest.mark.slow),
    ],
)
def test_other_errors_are_the_spread_over_samples_of_the_same_source(name, items):
    """The wanted value is the standard deviation over 150 fresh samples of the source."""

    def sample(generator, size):
        if name == "spearmanr":
            truth = generator.normal(size=size)
            return truth + generator.normal(size=size), truth
        truth = generator.integers(2, size=size)
        return np.where(generator.random(size) < 0.8, truth, 1 - truth), truth

    generator = np.random.default_rng(1)
    scores = [METRICS[name](*sample(generator, items), 2) for _ in range(150)]
    own = sample(generator, items)
    found = standard_error(METRICS[name], METRICS[name](*own, 2), *own, 2)
    assert found == pytest.approx(np.std(scores), rel=0.3)
    assert found == standard_error(METRICS[name], 0.0, *own, 2), "seeded"


def test_the_error_of_a_mean_over_tokens_is_the_spread_over_rows():
    generator = np.random.default_rng(0)

    def sample():
        counts = generator.integers(5, 30, size=200)
        levels = generator.normal(3, 0.5, size=200)  # tokens of one row go together
        return levels * counts + generator.normal(size=200) * np.sqrt(counts), counts

    means = [sums.sum() / counts.sum() for sums, counts in (sample() for _ in range(400))]
    assert ratio_error(*sample()) == pytest.approx(np.std(means), rel=0.25)


def test_without_a_spread_there_is_no_error(monkeypatch):
    monkeypatch.setattr("distill_llm.metrics.registry.METRICS", {})
    assert ratio_error(np.ones(1), np.ones(1)) is None
    assert standard_error(METRICS["f1"], 1.0, np.ones(1), np.ones(1), 2) is None

    @metric("classes")
    def undefined(predictions, references):
        raise ValueError("needs more")

    from distill_llm.metrics.registry import METRICS as own

    assert standard_error(own["undefined"], 0.5, np.ones(9), np.ones(9)) is None


def test_a_score_is_shown_with_its_error():
    assert shown_score({"score": 0.87266, "standard_error": 0.01129}) == "0.8727 ± 0.0113"
    assert shown_score({"score": 0.87266}) == "0.8727"
