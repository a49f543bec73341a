"""The example of docs/development/add-a-metric.md: decorated functions, used by name."""

import re
from pathlib import Path

import pytest
import torch
from builders.models import tiny_model
from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, collator
from distill_llm.data.kinds.classification import classification
from distill_llm.data.loading import read_task
from distill_llm.evaluation import compute_metrics, evaluate_model
from distill_llm.metrics import METRICS, metric

PAGE = Path(__file__).parents[2] / "docs" / "development" / "add-a-metric.md"


@pytest.fixture(autouse=True)
def page():
    """The page's metrics, registered for one test."""
    before = dict(METRICS)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(code, {})
    yield
    METRICS.clear()
    METRICS.update(before)


def rows(labels: list) -> str:
    return "text,label\n" + "".join(f"t{i},{label}\n" for i, label in enumerate(labels))


class Padding:
    pad_token_id, pad_token_type_id, padding_side = 0, 0, "right"


def test_a_model_is_scored_by_it(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(rows(["no", "yes"] * 5))
    task = read_task(DataSpec("classification", str(tmp_path / "a.csv"), metric="balanced_accuracy")).task
    assert (task.main_metric, task.metrics) == ("balanced_accuracy", ("accuracy", "f1", "balanced_accuracy"))
    model = tiny_model()
    with torch.no_grad():  # every answer is class 1
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))
    ids = {"input_ids": [[5, 6]] * 8, "attention_mask": [[1, 1]] * 8, "length": [2] * 8}
    data = Dataset.from_dict({**ids, "labels": [1] * 6 + [0] * 2})
    got = evaluate_model(model, data, task, collator(task, Padding()), progress=False)
    assert got.pop("rows") == 8 and 0 < got.pop("standard_error") < 0.3
    # of class 1 all are found, of class 0 none: (1 + 0) / 2; accuracy 6/8, f1 2 * 6 / (2 * 6 + 2)
    assert got == {"accuracy": 0.75, "f1": pytest.approx(12 / 14), "balanced_accuracy": 0.5, "score": 0.5}


def test_less_may_be_better(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(rows([1, 2.5, 4]))
    task = read_task(DataSpec("regression", str(tmp_path / "a.csv"), metric="mean_absolute_error")).task
    assert not task.higher_is_better
    assert compute_metrics(task, [1.0, 2.0, 4.0], [1.0, 3.0, 2.0])["score"] == pytest.approx((0 + 1 + 2) / 3)


@pytest.mark.parametrize(
    ("task", "name", "words"),
    [
        ("classification", "pearsonr", "one of accuracy, f1, matthews_correlation, balanced_accuracy"),
        ("regression", "spearman", "'spearmanr' (the nearest)"),
        ("sst2", "exact_match", "one of accuracy, f1"),
        ("text", "accuracy", "leave it out: a text task is scored by the loss alone"),
    ],
)
def test_a_metric_of_other_inputs_is_refused_before_any_row_is_read(task: str, name: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        read_task(DataSpec(task, "missing", metric=name))
    assert caught.value.field == "evaluation.metric" and words in str(caught.value)


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(InputError, match="metric: got 'accuracy'; choose another name"):

        @metric("classes")
        def accuracy(predictions, references):
            return 1.0


def test_the_number_of_classes_is_handed_to_who_asks_for_it() -> None:
    @metric("classes")
    def count(predictions, references, num_labels):
        return num_labels

    task = classification("three", ("text",), ("a", "b", "c"), ("count",))
    assert compute_metrics(task, [0], [0]) == {"count": 3.0, "score": 3.0}


@pytest.mark.parametrize(
    "returned, words",
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ([1.0, 0.0], "a list"),
        (torch.zeros(3), "a Tensor"),
        (None, "a None"),
    ],
)
def test_a_metric_returns_one_finite_number(returned, words) -> None:
    @metric("classes")
    def mine(predictions, references):
        return returned

    with pytest.raises(InputError, match=f"^metric: got 'mine'; return one finite number: it returned {words}"):
        METRICS["mine"]([0, 1], [1, 1])
