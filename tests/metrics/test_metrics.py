"""Metrics against counts and sums written out."""

import socket
from pathlib import Path

import numpy as np
import pytest

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec
from distill_llm.data.glue import GLUE
from distill_llm.data.kinds.classification import classification
from distill_llm.data.loading import read_task
from distill_llm.evaluation import compute_metrics
from distill_llm.metrics import METRICS, find_metric


def f1_of(predictions: np.ndarray, references: np.ndarray, label: int) -> float:
    """Twice the hits over all that were predicted or meant."""
    hits = sum(p == r == label for p, r in zip(predictions, references, strict=True))
    return 2 * hits / (sum(predictions == label) + sum(references == label))


def matthews_of(predictions: np.ndarray, references: np.ndarray) -> float:
    """Gorodkin (2004), equation 8, on the table of confusions."""
    classes = sorted({*predictions.tolist(), *references.tolist()})
    table = np.array([[np.sum((references == r) & (predictions == p)) for p in classes] for r in classes], dtype=float)
    total, right, meant, said = table.sum(), np.trace(table), table.sum(1), table.sum(0)
    spread = np.sqrt((total**2 - said @ said) * (total**2 - meant @ meant))
    return float((right * total - said @ meant) / spread)


CLASS_REFERENCES = {
    "accuracy": lambda p, r: sum(p == r) / len(p),
    "f1": lambda p, r: np.mean([f1_of(p, r, label) for label in range(max(r) + 1)]),
    "matthews_correlation": matthews_of,
}


def test_modules_load_without_network_or_stray_files(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    for name in METRICS:
        kind = str if name in ("exact_match", "final_answer") else int
        predictions, references = ([kind(value) for value in values] for values in ([0, 1, 1], [0, 1, 0]))
        assert 0 < find_metric(name)(predictions, references, 2) < 1
    assert not list(tmp_path.iterdir())


def test_unknown_metric_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(InputError, match="'accuracy'"):
        find_metric("acuracy")


@pytest.mark.parametrize("classes", [3, 5])
@pytest.mark.parametrize("name", CLASS_REFERENCES)
def test_class_metrics_equal_counts(name: str, classes: int) -> None:
    draw = np.random.default_rng(classes)
    references = draw.integers(0, classes, 300)
    predictions = np.where(draw.random(300) < 0.6, references, draw.integers(0, classes, 300))
    got = find_metric(name)(predictions, references, classes)
    assert got == pytest.approx(CLASS_REFERENCES[name](predictions, references), abs=1e-12)


def test_f1_of_two_classes_is_that_of_class_1_and_zero_without_hits() -> None:
    draw = np.random.default_rng(0)
    predictions, references = draw.integers(0, 2, 200), draw.integers(0, 2, 200)
    assert find_metric("f1")(predictions, references, 2) == pytest.approx(f1_of(predictions, references, 1), abs=1e-12)
    assert find_metric("f1")([0, 0], [1, 0], 2) == find_metric("f1")([0], [0], 2) == 0.0


def test_exact_match_counts_equal_texts_but_for_white_space_at_their_ends() -> None:
    predictions, references = ["a b", " a b\n", "a  b", "A b", ""], ["a b"] * 4 + [" "]
    got = find_metric("exact_match")(predictions, references)
    assert got == pytest.approx(3 / 5)


RATIONALE = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all she sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.mark.parametrize(
    ("prediction", "reference", "same"),
    [
        ("48 / 2 is 24, so she sold 72 clips.", RATIONALE, True),
        ("48 / 2 is 24, so she sold 70 clips.", RATIONALE, False),
        ("She sold 72.0\n#### 72.00 clips, 24 of them in May", RATIONALE, True),
        ("#### 71\nNo: #### 72\nQuestion: what are 2 and 2?", RATIONALE, True),
        ("72 clips #### 24", RATIONALE, False),
        ("The answer is \\boxed{72}.", RATIONALE, True),
        ("72 is what she sold in 2 months", RATIONALE, False),  # nothing marks it: the last number
        ("seventy-two", RATIONALE, False),
        ("", RATIONALE, False),
        ("", "", True),
        ("It costs $1,250.50", "#### 1250.5", True),
        ("It costs $1,250,5", "#### 1250.5", False),
        ("1, 2, 1000", "#### 1,000", True),
        ("It falls by 12-5 = 7", "#### 7", True),
        ("from 12 to 12-5", "#### 5", True),
        ("it is -$5", "#### -5", True),
        ("it is 5", "#### -5", False),
        ("half: .5", "#### 0.50", True),
        ("#### Yes.", "They do.\n#### yes", True),
        (" yes\n", "#### yes", True),
        ("They do, yes", "#### yes", False),
        ("72 ####", "####", True),
    ],
)
def test_final_answers_are_the_same_number_or_words(prediction: str, reference: str, same: bool) -> None:
    got = find_metric("final_answer")([prediction], [reference])
    assert got == float(same)


def test_final_answer_is_the_share_of_texts() -> None:
    predictions = ["it is 1", "it is 2", "it is 3", "it is 5"]
    references = [f"#### {number}" for number in range(1, 5)]
    assert find_metric("final_answer")(predictions, references) == 0.75


def rank(values: np.ndarray) -> list[float]:
    """How many values are less, and half of how many are equal."""
    return [np.sum(values < value) + np.sum(values == value) / 2 for value in values]


@pytest.mark.parametrize("decimals", [6, 0], ids=["distinct", "with ties"])
def test_correlations_equal_those_of_values_and_of_ranks(decimals: int) -> None:
    draw = np.random.default_rng(1)
    references = np.round(draw.random(200) * 5, decimals)
    predictions = np.round(references + draw.normal(0, 1, 200), decimals)
    assert find_metric("pearsonr")(predictions, references) == pytest.approx(
        np.corrcoef(predictions, references)[0, 1], abs=1e-12
    )
    assert find_metric("spearmanr")(predictions, references) == pytest.approx(
        np.corrcoef(rank(predictions), rank(references))[0, 1], abs=1e-12
    )


def test_a_single_row_has_no_correlation() -> None:
    assert find_metric("pearsonr")([2.0], [1.0]) == find_metric("spearmanr")([2.0], [1.0]) == 0.0


@pytest.mark.parametrize("name", ["matthews_correlation", "pearsonr", "spearmanr"])
def test_constant_predictions_score_zero(name: str) -> None:
    assert find_metric(name)([1, 1, 1], [0, 1, 1]) == 0.0


def test_every_glue_task_has_a_score() -> None:
    for task in GLUE.values():
        result = compute_metrics(task, [0, 1, 1, 0], [0, 1, 0, 0])
        assert set(result) == {*task.metrics, "score"} and result["score"] == result[task.main_metric]


def test_f1_of_more_than_two_classes_is_the_mean_over_classes() -> None:
    task = classification("three", ("text",), ("a", "b", "c"), ("accuracy", "f1"))
    got = compute_metrics(task, [0, 1, 2, 2], [0, 1, 1, 2])
    assert got["f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3) and got["score"] == 0.75


SCRIPT = """
import datasets
import evaluate

class {name}(evaluate.Metric):
    def _info(self):
        features = datasets.Features({{each: datasets.Value("string") for each in ("predictions", "references")}})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        pairs = [(set(p.split()), set(r.split())) for p, r in zip(predictions, references)]
        shares = [len(p & r) / len(r) for p, r in pairs]
        return {returned}
"""


def script(folder: Path, name: str, returned: str) -> str:
    """A metric module of one's own: shares of the reference's words."""
    (folder / f"{name}.py").write_text(SCRIPT.format(name=name.title(), returned=returned))
    return str(folder / f"{name}.py")


@pytest.mark.parametrize(
    ("name", "returned", "wanted", "score", "higher"),
    [
        ("overlap", "{'overlap': sum(shares) / len(shares), 'least': min(shares), 'rows': shares}", "", 0.75, True),
        ("lowest", "{'overlap': sum(shares) / len(shares), 'least': min(shares), 'rows': shares}", ":least", 0.5, True),
        ("single", "{'score': sum(shares) / len(shares), 'rows': shares}", "", 0.75, True),
        ("misses", "1 - sum(shares) / len(shares)", "", 0.25, False),
    ],
)
def test_any_metric_of_evaluate_scores_generated_texts(name, returned, wanted, score, higher, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "response": "y"}\n' * 4)
    metric = script(tmp_path, name, returned) + wanted
    task = read_task(DataSpec("prompts", str(tmp_path / "a.jsonl"), metric=metric)).task
    assert (task.main_metric, task.higher_is_better) == (f"{name}.py{wanted}", higher)
    got = compute_metrics(task, ["a b", "c e"], ["a b", "c d"])
    assert got == {f"{name}.py{wanted}": pytest.approx(score), "score": pytest.approx(score)}


@pytest.mark.parametrize(
    ("name", "returned", "wanted", "words"),
    [
        ("broken", "1 / 0", "", "or a metric of evaluate for texts (division by zero)"),
        ("several", "{'one': 1.0, 'least': min(shares)}", "", "several.py:one"),
        ("named", "{'one': 1.0, 'least': min(shares)}", ":lest", "named.py:least' (the nearest)"),
        ("constant", "{'one': 1.0}", "", "a metric that gives equal texts another value"),
    ],
)
def test_a_metric_that_cannot_score_texts_is_one_line_before_any_row_is_read(
    name: str, returned: str, wanted: str, words: str, tmp_path: Path
) -> None:
    metric = script(tmp_path, name, returned) + wanted
    with pytest.raises(InputError) as caught:
        read_task(DataSpec("prompts", str(tmp_path / "missing"), metric=metric))
    line = str(caught.value)
    assert line.startswith("evaluation.metric: got") and words in line and "\n" not in line


def test_a_module_that_is_not_there_is_one_line_with_the_nearest_of_ours(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_task(DataSpec("prompts", str(tmp_path), metric="exact_mach"))
    line = str(caught.value)
    assert "'exact_match' (the nearest), or one of perplexity" in line and "Couldn't find a module" in line
    assert "\n" not in line
