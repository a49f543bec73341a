"""Files as people have them: separators, encodings, compression."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path

import pytest

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, load_task
from distill_llm.data.loading import read_task

ROWS = [("text", "label")] + [(f"café {i}, a film; good | or\tnot", ("no", "yes")[i % 2]) for i in range(20)]
OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, "": open}


def write(file: Path, separator: str = ",", encoding: str = "utf-8") -> Path:
    """The rows as a table (quoted where needed), or as JSON lines, compressed as the name says."""
    with OPEN[file.suffix if file.suffix in OPEN else ""](file, "wt", encoding=encoding, newline="") as out:
        if ".jsonl" in file.suffixes:
            out.writelines(json.dumps(dict(zip(*pair, strict=True)), ensure_ascii=False) + "\n" for pair in pairs())
        else:
            csv.writer(out, delimiter=separator).writerows(ROWS)
    return file


def pairs() -> list[tuple[tuple[str, str], tuple[str, str]]]:
    return [(ROWS[0], row) for row in ROWS[1:]]


def texts(path: Path, **spec) -> set[str]:
    data = read_task(DataSpec("classification", str(path), **spec))
    assert data.task.label_names == ("no", "yes")
    return {*data.train["text"], *data.test["text"]}


WANTED = {text for text, _ in ROWS[1:]}


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_the_separator_of_a_table_is_found_in_its_header(tmp_path, separator):
    assert texts(write(tmp_path / "a.csv", separator)) == WANTED


def test_a_rare_separator_is_said(tmp_path):
    file = write(tmp_path / "a.csv", "^")
    with pytest.raises(InputError) as caught:
        read_task(DataSpec("classification", str(file)))
    assert caught.value.field == "data.columns.text"
    assert texts(file, separator="^") == WANTED


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, name, encoding):
    assert texts(write(tmp_path / name, encoding=encoding)) == WANTED


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_bytes_that_are_not_utf_8_ask_for_the_encoding(tmp_path, name):
    file = write(tmp_path / name, encoding="cp1252")
    with pytest.raises(InputError, match="set it to the encoding of") as caught:
        read_task(DataSpec("classification", str(file)))
    assert caught.value.field == "data.encoding" and "\n" not in str(caught.value)
    assert texts(file, encoding="cp1252") == WANTED


def test_plain_text_has_an_encoding_too(tmp_path):
    (tmp_path / "a.txt").write_text("naïve\n\ncafé\n\nthé", encoding="cp1252")
    data = read_task(DataSpec("text", str(tmp_path / "a.txt"), encoding="cp1252"))
    assert {*data.train["text"], *data.test["text"]} == {"naïve", "café", "thé"}
    (tmp_path / "b.txt").write_text("naïve\n\ncafé\n\nthé", encoding="utf-16")
    data = read_task(DataSpec("text", str(tmp_path / "b.txt")))
    assert {*data.train["text"], *data.test["text"]} == {"naïve", "café", "thé"}


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("kind", [".csv", ".jsonl"])
def test_compressed_files_are_read(tmp_path, kind, compression):
    assert texts(write(tmp_path / f"a{kind}{compression}", ";")) == WANTED


def test_compressed_splits_of_a_folder_and_compressed_text_are_read(tmp_path):
    write(tmp_path / "train.csv.gz")
    write(tmp_path / "test.csv.gz")
    data = read_task(DataSpec("classification", str(tmp_path)))
    assert len(data.train) == len(data.test) == 20
    with gzip.open(tmp_path / "a.txt.gz", "wt", encoding="utf-8") as out:
        out.write("one\n\ntwo\n\nthree")
    data = read_task(DataSpec("text", str(tmp_path / "a.txt.gz")))
    assert {*data.train["text"], *data.test["text"]} == {"one", "two", "three"}


@pytest.mark.parametrize(
    ("name", "spec", "field"),
    [
        ("a.jsonl", {"separator": ";"}, "data.separator"),
        ("a.csv", {"separator": "::"}, "data.separator"),
        ("a.csv", {"encoding": "utf-9"}, "data.encoding"),
    ],
)
def test_a_format_that_does_not_fit_the_file_is_one_line(tmp_path, name, spec, field):
    with pytest.raises(InputError) as caught:
        read_task(DataSpec("classification", str(write(tmp_path / name)), **spec))
    assert caught.value.field == field and "\n" not in str(caught.value)


@pytest.mark.parametrize("given", [{"separator": ";"}, {"encoding": "cp1252"}, {"drop_incomplete": True}])
def test_rows_that_are_not_the_users_own_have_no_format(given):
    with pytest.raises(InputError, match="leave it out") as caught:
        read_task(DataSpec("embedded", **given))
    assert caught.value.field == f"data.{next(iter(given))}"


def test_in_python_faults_have_the_names_of_the_specs_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\na,no\n,yes\nb,\nc,yes\n")
    for changes, line in (
        ({"path": "./none.csv"}, "path: got './none.csv'"),
        ({"columns": {"text": "txt"}}, "columns.text: got 'txt'"),
        ({"encoding": "utf-9"}, "encoding: got 'utf-9'"),
        ({"metric": "bleu"}, "metric: got 'bleu'"),
        ({"task": "sst3"}, "task: got 'sst3'"),
        (
            {},
            "columns.label: got 'no value in 1 (number 3, counted from 1) of the train rows'; fill them in, or set `drop_inc",
        ),
    ):
        with pytest.raises(InputError) as caught:
            load_task(DataSpec(**{"task": "classification", "path": str(tmp_path / "a.csv"), **changes}))
        assert str(caught.value).startswith(line)


def test_a_file_without_rows_and_a_folder_without_data_say_so(tmp_path: Path) -> None:
    (tmp_path / "head.csv").write_text("text,label\n")
    (tmp_path / "two.csv").write_text("text,label\na,no\nb,yes\n")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "notes.md").write_text("x")
    for name, line in (
        ("head.csv", "accepted: a file with rows: it has none"),
        ("junk", "accepted: a folder with files train.*, validation.* or test.* (.csv, "),
        ("two.csv", "accepted: at least two classes in the training rows (they have only 'yes')"),
    ):
        with pytest.raises(InputError) as caught:
            load_task(DataSpec("classification", str(tmp_path / name)))
        assert str(caught.value).partition("; ")[2].startswith(line)
