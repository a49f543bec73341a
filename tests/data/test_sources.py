"""`package://` paths, files, folders and text."""

import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, resolve_path
from distill_llm.data.files import read_documents
from distill_llm.data.loading import read_task


def documents(file: Path) -> list[str]:
    return [row["text"] for row in read_documents([str(file)], [(0, 0)])]


@pytest.fixture
def broken_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that cannot be imported, with a file inside."""
    folder = tmp_path / "site" / "broken_package"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "rows.csv").write_text("text,label\na,x\nb,y\nc,x\n")
    monkeypatch.syspath_prepend(str(folder.parent))
    return "broken_package"


def test_package_path_is_found_without_importing(broken_package: str) -> None:
    found = resolve_path(f"package://{broken_package}/rows.csv")
    assert Path(found).read_text().startswith("text") and broken_package not in sys.modules
    assert len(read_task(DataSpec("classification", f"package://{broken_package}/rows.csv")).train) == 2


@pytest.mark.parametrize(
    "text", ["package://not_there_at_all/x", "package://transformers/no/such", "package://a.b-c/x"]
)
def test_package_path_that_is_not_there_is_one_line(text: str) -> None:
    with pytest.raises(InputError, match="package") as caught:
        resolve_path(text, "teacher.model")
    assert caught.value.field == "teacher.model"


def test_other_paths_are_unchanged() -> None:
    assert resolve_path("bert-base-uncased") == "bert-base-uncased"


def test_documents_end_at_marks_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\nstill one<|endoftext|>two\n<|endoftext|>\n\nthree\n\n\nfour", encoding="utf-8")
    assert documents(file) == ["one\nstill one", "two", "three", "four"]


def test_documents_of_endless_files_stay_short(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("word " * 100 + "\n", encoding="utf-8")
    file.write_text(file.read_text() * 1000, encoding="utf-8")
    found = documents(file)
    assert max(map(len, found)) <= 100_600 and sum(len(text.split()) for text in found) == 100_000


def test_changed_text_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one\n\ntwo\n\nthree")
    assert len(read_task(DataSpec("text", str(file))).train) == 2
    file.write_text("one\n\ntwo\n\nthree\n\nfour")
    assert len(read_task(DataSpec("text", str(file))).train) == 3


def test_text_from_files_and_folders_and_columns(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"body": [f"document {i}" for i in range(20)], "other": list(range(20))})
    rows.to_json(tmp_path / "a.jsonl")
    data = read_task(DataSpec("text", str(tmp_path / "a.jsonl"), columns={"text": "body"}))
    assert (len(data.train), len(data.test), data.train.column_names) == (18, 2, ["body"])
    assert {*data.train["body"]}.isdisjoint(data.test["body"]) and data.task.kind.name == "masked_lm"
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("b", "c"):
        (texts / f"{name}.txt").write_text(f"{name} one\n\n{name} two")
    data = read_task(DataSpec("text", str(texts), holdout_examples=1))
    assert data.validation and {*data.train["text"], *data.validation["text"], *data.test["text"]} == {
        "b one", "b two", "c one", "c two",
    }  # fmt: skip


def test_hub_id_takes_a_configuration_after_a_colon(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str) -> dict[str, Dataset]:
        asked.append((path, config))
        return {"train": Dataset.from_dict({"text": ["a", "b"]}), "test": Dataset.from_dict({"text": ["c"]})}

    monkeypatch.setattr("distill_llm.data.sources.load_dataset", load_dataset)
    assert read_task(DataSpec("text", "owner/name:part-1")).test["text"][:] == ["c"]
    assert asked == [("owner/name", "part-1")]


@pytest.mark.parametrize(
    ("content", "columns", "field"),
    [
        ("text\nonly one\n", None, "data.path"),
        ("body\na\nb\n", None, "data.columns.text"),
        ("text\na\nb", {"texts": "x"}, "data.columns"),
    ],
)
def test_unusable_text_is_one_line(content: str, columns: dict | None, field: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(InputError) as caught:
        read_task(DataSpec("text", str(tmp_path / "a.csv"), columns=columns))
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_what_datasets_saved_to_disk_is_read_back(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": [f"row {i}" for i in range(20)], "label": [0, 1] * 10})
    parts = DatasetDict({"train": rows.select(range(12)), "dev": rows.select(range(12, 15)), "test": rows.select([17])})
    rows.with_format("torch").save_to_disk(tmp_path / "one")
    parts.save_to_disk(tmp_path / "parts")
    data = read_task(DataSpec("classification", str(tmp_path / "one")))
    assert (len(data.train), len(data.test)) == (18, 2)
    assert sorted([*data.train["text"], *data.test["text"]]) == sorted(rows["text"])
    data = read_task(DataSpec("text", str(tmp_path / "parts")))
    assert data.validation and (len(data.train), len(data.validation)) == (12, 3)
    assert data.test["text"][:] == ["row 17"]
    (tmp_path / "parts" / "test" / "state.json").write_text("{")
    with pytest.raises(InputError) as caught:
        read_task(DataSpec("text", str(tmp_path / "parts")))
    assert caught.value.field == "data.path" and "\n" not in str(caught.value)


def test_saved_rows_of_a_folder_that_cannot_be_written_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "saved"
    Dataset.from_dict({"text": [f"row {i}" for i in range(20)]}).save_to_disk(folder)
    monkeypatch.setattr("distill_llm.data.sources.os.access", lambda path, mode: False)
    before = sorted(folder.iterdir())
    assert len(read_task(DataSpec("text", str(folder), train_examples=5)).train) == 5
    assert sorted(folder.iterdir()) == before
