"""Which rows are set apart, and which are left out."""

from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import BertConfig

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec
from distill_llm.data.loading import read_task
from distill_llm.data.splitting import set_apart, shares_of


def written(folder: Path, labels: list, name: str = "a.jsonl", **columns: list) -> str:
    rows = {"text": [f"text {i}" for i in range(len(labels))], "label": labels, **columns}
    Dataset.from_dict(rows).to_json(folder / name)
    return str(folder / name)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.name == "distill_llm")


@pytest.mark.parametrize(
    ("sizes", "count", "wanted"),
    [
        ({"a": 90, "b": 10}, 10, {"a": 9, "b": 1}),
        ({"a": 96, "b": 4}, 10, {"a": 10, "b": 0}),  # 9.6 and 0.4
        ({"a": 15, "b": 15, "c": 1}, 3, {"a": 2, "b": 1, "c": 0}),  # 1.45, 1.45, 0.10
        ({"a": 2, "b": 2}, 3, {"a": 2, "b": 1}),  # one row of one class has to go
        ({"a": 1, "b": 1}, 1, {"a": 1, "b": 0}),
    ],
)
def test_classes_give_rows_in_proportion_and_keep_one(sizes, count, wanted):
    assert shares_of(sizes, count) == wanted


@pytest.mark.parametrize("seed", range(3))
def test_every_class_loses_its_share_and_no_row_is_lost(seed):
    classes = ["a"] * 60 + ["b"] * 30 + ["rare"] * 2 + ["once"]
    rows = Dataset.from_dict({"at": list(range(len(classes)))})
    kept, apart = set_apart(rows, 9, seed, classes)
    assert sorted([*kept["at"], *apart["at"]]) == list(range(93))
    assert Counter(classes[at] for at in apart["at"]) == {"a": 6, "b": 3}
    assert apart["at"][:] != sorted(apart["at"]) and set_apart(rows, 9, seed + 1, classes)[1]["at"][:] != apart["at"][:]


def test_without_classes_rows_are_drawn_from_all_alike():
    rows = Dataset.from_dict({"at": list(range(1000))})
    kept, apart = set_apart(rows, 300, 0)
    assert sorted([*kept["at"], *apart["at"]]) == list(range(1000)) and 430 < sum(apart["at"]) / 300 < 570


def test_a_rare_class_stays_in_the_training_rows_and_the_user_is_told(tmp_path, caplog):
    # one of these seeds of order puts both rows of `rare` into a tenth that is drawn from all alike
    labels = ["often"] * 60 + ["rare"] * 2 + ["other"] * 38
    for turn in range(10):
        folder = tmp_path / str(turn)
        folder.mkdir()
        data = read_task(DataSpec("classification", written(folder, labels[turn * 7 :] + labels[: turn * 7])))
        names = data.task.label_names
        assert Counter(names[label] for label in data.train["labels"]) == {"often": 54, "other": 34, "rare": 2}
        assert Counter(names[label] for label in data.test["labels"]) == {"often": 6, "other": 4}
    assert "10 of 100 rows" in said(caplog) and "often 6, other 4, no row of rare" in said(caplog)


def test_held_out_rows_leave_every_class_in_the_training_rows(tmp_path):
    for name in ("train", "test"):
        written(tmp_path, ["often"] * 30 + ["rare"], f"{name}.jsonl")
    for seed in range(5):
        data = read_task(DataSpec("classification", str(tmp_path), holdout_examples=15, seed=seed))
        assert data.validation and Counter(data.validation["labels"]) == {0: 15} and 1 in data.train["labels"]


@pytest.mark.parametrize("task", ["classification", "text"])
def test_test_rows_can_be_fewer(task, tmp_path):
    for name in ("train", "test"):
        written(tmp_path, [0, 1] * 10, f"{name}.jsonl")
    data = read_task(DataSpec(task, str(tmp_path), test_examples=6, seed=1))
    other = read_task(DataSpec(task, str(tmp_path), test_examples=6, seed=2))
    assert len(data.test) == len(other.test) == 6 and len({*data.test["text"]}) == 6 and len(data.train) == 20
    assert {*data.test["text"]} != {*other.test["text"]}
    with pytest.raises(InputError, match=r"1 to 20 \(the number of test rows\)") as caught:
        read_task(DataSpec(task, str(tmp_path), test_examples=21))
    assert caught.value.field == "data.test_examples"


@pytest.mark.parametrize("missing", [None, "", "  "])
def test_rows_without_a_label_are_numbered_or_left_out(missing, tmp_path, caplog):
    labels = ["yes", "no"] * 10
    labels[3] = labels[12] = missing
    path = written(tmp_path, labels)
    with pytest.raises(
        InputError, match=r"2 \(numbers 4, 13, counted from 1\) of the train rows.*drop_incomplete"
    ) as caught:
        read_task(DataSpec("classification", path))
    assert caught.value.field == "data.columns.label"
    data = read_task(DataSpec("classification", path, drop_incomplete=True))
    assert len(data.train) + len(data.test) == 18 and data.task.label_names == ("no", "yes")
    assert {"text 3", "text 12"}.isdisjoint([*data.train["text"], *data.test["text"]])
    assert "left out 2 (numbers 4, 13, counted from 1) of 20 train rows, without label" in said(caplog)


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_rows_without_a_number_are_left_out(missing, tmp_path):
    rows = Dataset.from_dict({"text": list("abcdef"), "label": [1.0, 2.0, missing, 4.0, 5.0, 6.0]})
    rows.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(InputError, match="number 3, counted"):
        read_task(DataSpec("regression", str(tmp_path / "a.parquet")))
    data = read_task(DataSpec("regression", str(tmp_path / "a.parquet"), drop_incomplete=True))
    assert sorted([*data.train["labels"], *data.test["labels"]]) == [1, 2, 4, 5, 6]


@pytest.mark.parametrize("task", ["text", "prompts"])
def test_rows_without_a_text_are_left_out_of_every_kind_of_task(task, tmp_path):
    column = {"text": "text", "prompts": "response"}[task]
    rows = {"prompt": list("abcd"), "response": list("efgh"), "text": list("ijkl")}
    rows[column][2] = None
    Dataset.from_dict(rows).to_json(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match="number 3, counted") as caught:
        read_task(DataSpec(task, str(tmp_path / "a.jsonl")))
    assert caught.value.field == f"data.columns.{column}"
    data = read_task(DataSpec(task, str(tmp_path / "a.jsonl"), drop_incomplete=True))
    assert len(data.train) + len(data.test) == 3


def test_a_column_without_any_value_is_refused_though_incomplete_rows_may_go(tmp_path):
    with pytest.raises(InputError, match="no value in any train row"):
        read_task(DataSpec("classification", written(tmp_path, [None] * 4), drop_incomplete=True))


def test_words_are_classes_without_the_blanks_around_them_and_their_order_is_said(tmp_path, caplog):
    path = written(tmp_path, ["positive", " negative", "negative ", "positive"] * 5)
    data = read_task(DataSpec("classification", path), BertConfig())
    assert data.task.label_names == ("negative", "positive")
    assert "labels: negative=0, positive=1, in alphabetical order, because the model names no classes" in said(caplog)


def test_the_order_of_words_is_not_said_where_the_model_has_it(tmp_path, caplog):
    config = BertConfig(id2label={0: "Positive", 1: "Negative"})
    data = read_task(DataSpec("classification", written(tmp_path, ["positive", "negative"] * 5)), config)
    assert data.task.label_names == ("Positive", "Negative") and "labels:" not in said(caplog)
