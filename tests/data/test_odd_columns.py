"""Columns that hold something else than texts and labels: one line that says what they hold."""

import json

import pandas as pd
import pytest

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec
from distill_llm.data.loading import read_task

TEXTS = {
    "lists": [["the", "film"]] * 4,
    "mappings": [{"a": "the"}] * 4,
    "values of several kinds": ["the", {"a": 1}] * 2,
    "int64 values": [1, 2, 3, 4],
}
LABELS = {"lists": [[0, 1]] * 4, "mappings": [{"a": 1}] * 4, "values of several kinds": ["a", [1]] * 2}


def fault(tmp_path, rows: list[dict], task: str) -> str:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(InputError) as error:
        read_task(DataSpec(task, str(file)))
    return str(error.value)


@pytest.mark.parametrize("held", TEXTS)
@pytest.mark.parametrize("task", ["classification", "regression", "prompts"])
def test_a_column_of_something_else_than_texts_is_said(tmp_path, task, held):
    name = "prompt" if task == "prompts" else "text"
    rows = [{name: value, "label": i % 2, "response": "x"} for i, value in enumerate(TEXTS[held])]
    line = fault(tmp_path, rows, task)
    assert line == f"data.columns.{name}: got '{name}'; accepted: a column of texts; the train split has {held}"


@pytest.mark.parametrize("held", LABELS)
@pytest.mark.parametrize("task", ["classification", "regression"])
def test_labels_that_are_not_one_value_a_row_are_said(tmp_path, task, held):
    line = fault(tmp_path, [{"text": "the film", "label": value} for value in LABELS[held]], task)
    assert line.endswith(f"a column with one word or number in every row; the train split has {held}")


def test_what_pandas_writes_by_default_is_said_with_the_way_to_write_it(tmp_path):
    file = tmp_path / "rows.json"
    table = pd.DataFrame({"text": ["good", "bad"] * 9, "label": [0, 1] * 9})
    table.to_json(file)
    with pytest.raises(InputError, match=r'to_json\(\.\.\., orient="records", lines=True\)'):
        read_task(DataSpec("classification", str(file)))
    table.to_json(file, orient="records", lines=True)
    assert read_task(DataSpec("classification", str(file))).train.num_rows == 17
