"""What libraries raise at the door (of files, tables, configs, long names) is one line that names the field."""

import json

import pytest
from builders.recipes import faults_at_the_door as faults
from builders.recipes import recipe_with, write_model, write_rows
from typer.testing import CliRunner

from distill_llm.cli.main import app

LONG = "a" * 300  # longer than a file's name may be


@pytest.fixture
def folder(tmp_path):
    """A folder with a teacher and rows that fit the recipe of `recipe_for`."""
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    return tmp_path


@pytest.mark.parametrize(
    "text", ["[]", "{", "", '{"model_type": ["bert"]}', '{"model_type": "bert", "hidden_size": null}']
)
def test_a_broken_config_is_one_line(folder, text):
    (folder / "teacher" / "config.json").write_text(text)
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and "\n" not in line


@pytest.mark.parametrize("text", ["[]", "{", '{"model": 3}'])
def test_a_broken_tokenizer_is_one_line(folder, text):
    (folder / "teacher" / "tokenizer.json").write_text(text)
    (line,) = faults(recipe_with(folder))
    assert line.startswith("teacher.model: got ") and "\n" not in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.parquet", b"PAR1 and nothing else"),
        ("rows.jsonl", b'{"review": "the film", "mood": '),
        ("rows.jsonl", b'{"review": {"a": 1}, "mood": "neg"}\n{"review": "the film", "mood": [1]}\n'),
        ("rows.jsonl", b'{"review": [["the"]], "mood": {"is": "neg"}}\n' * 40),
        ("rows.json", b"\xff\xfe\x00"),
        ("rows.csv", b"review,mood\n" + b"the film,neg,more,and more\n" * 20),
    ],
    ids=["parquet", "cut line", "mixed", "nested", "bytes", "ragged"],
)
def test_a_broken_table_is_one_line(folder, name, content):
    (folder / name).write_bytes(content)
    (line,) = faults(recipe_with(folder, data__path=str(folder / name)))
    assert line.startswith("data.") and "\n" not in line


@pytest.mark.parametrize("change", ["teacher__model", "data__path", "output_dir"])
def test_a_name_that_is_too_long_is_one_line(folder, change):
    found = faults(recipe_with(folder, **{change: str(folder / LONG)}))
    assert len(found) == 1 and found[0].startswith(change.replace("__", ".") + ": got ")


def test_names_that_are_too_long_are_one_line_on_the_command_line(folder):
    evaluate = ["evaluate", str(folder / "teacher"), "--task", "classification", "--data", str(folder / "rows.csv")]
    for args, field in (
        (["run", LONG], "RECIPE"),
        (["profile", LONG], "MODEL"),
        ([*evaluate, "--output", str(folder / LONG)], "--output"),
        (["push", LONG, "me/student"], "DIR"),
    ):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 2 and result.stderr.startswith(f"error: {field}: got "), result.stderr


def test_a_broken_index_of_shards_is_one_line(folder):
    weights = folder / "teacher" / "model.safetensors"
    weights.unlink()
    for text in (json.dumps({"weight_map": 3}), "{", json.dumps({"weight_map": {"a": ["b"]}})):
        (folder / "teacher" / "model.safetensors.index.json").write_text(text)
        (line,) = faults(recipe_with(folder))
        assert line.startswith("teacher.model: got ") and "cannot be read" in line
