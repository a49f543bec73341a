"""GLUE from the official TSV files and from a folder laid out as the Hub's repository."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict

from distill_llm.common.errors import InputError
from distill_llm.data import GLUE, DataSpec
from distill_llm.data.loading import read_task

MNLI = ["index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse"]
MNLI += ["sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1"]
# (header line or None, one row, expected texts, expected label)
OFFICIAL = {
    "cola": (None, ["gj04", "0", "*", 'He "ate'], ('He "ate',), 0),
    "sst2": (["sentence", "label"], ['a "gem', "1"], ('a "gem',), 1),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], ["1", "7", "8", '" A', "B"], ('" A', "B"), 1),
    "stsb": (
        ["index", "genre", "filename", "year", "old_index", "source1", "source2", "sentence1", "sentence2", "score"],
        ["0", "g", "f", "y", "0", "n", "n", "A", "B", "3.8"],
        ("A", "B"),
        3.8,
    ),
    "qqp": (
        ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"],
        ["1", "2", "3", "A?", "None", "0"],
        ("A?", "None"),
        0,
    ),
    "mnli": (
        [*MNLI, "gold_label"],
        ["0", "1", "1n", "g", "p", "p", "p", "p", "A", "B", "neutral", "contradiction"],
        ("A", "B"),
        2,
    ),
    "qnli": (["index", "question", "sentence", "label"], ["0", "A?", "B", "not_entailment"], ("A?", "B"), 1),
    "rte": (["index", "sentence1", "sentence2", "label"], ["0", "A", "B", "entailment"], ("A", "B"), 0),
    "wnli": (["index", "sentence1", "sentence2", "label"], ["0", "A", "B", "1"], ("A", "B"), 1),
}


def write(folder: Path, name: str, rows: list[list[str]] | None = None) -> Path:
    header, row, _, _ = OFFICIAL[name]
    lines = ([header] if header else []) + (rows or [row] * 4)
    for file in ("train.tsv", "dev_matched.tsv" if name == "mnli" else "dev.tsv"):
        (folder / file).write_text("\n".join("\t".join(line) for line in lines) + "\n", encoding="utf-8")
    return folder


def test_scoring_alone_needs_no_training_rows(tmp_path: Path) -> None:
    (write(tmp_path, "sst2") / "train.tsv").unlink()
    data = read_task(DataSpec("sst2", str(tmp_path)), training=False)
    assert len(data.test) == 4 and data.validation is None
    with pytest.raises(InputError, match=r"train\.tsv"):
        read_task(DataSpec("sst2", str(tmp_path)))


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_tsv_of_every_task_gives_its_texts_and_labels(name: str, tmp_path: Path) -> None:
    data = read_task(DataSpec(name, str(write(tmp_path, name))))
    _, _, texts, label = OFFICIAL[name]
    assert data.task == GLUE[name] and set(OFFICIAL) == set(GLUE)
    for rows in (data.train, data.test):
        assert len(rows) == 4
        assert tuple(rows[0][column] for column in data.task.text_columns) == texts
        assert rows[0]["labels"] == pytest.approx(label)


@pytest.mark.parametrize("name", OFFICIAL)
def test_hub_repository_of_every_task_gives_its_texts_and_labels(name: str, tmp_path: Path) -> None:
    _, _, texts, label = OFFICIAL[name]
    task = GLUE[name]
    rows = Dataset.from_dict(
        {**{c: [t] * 3 for c, t in zip(task.text_columns, texts, strict=True)}, "label": [label] * 3}
    )
    if task.label_names:
        rows = rows.cast_column("label", ClassLabel(names=list(task.label_names)))
    validation = "validation_matched" if name == "mnli" else "validation"
    unlabelled = rows.remove_columns("label").add_column("label", [-1] * 3)
    for split, part in {"train": rows, validation: rows.select([0, 1]), "test": unlabelled}.items():
        part.to_parquet(tmp_path / name / f"{split}-00000-of-00001.parquet")
    listing = "\n".join(f"  - split: {s}\n    path: {name}/{s}-*.parquet" for s in ("train", validation))
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files:\n{listing}\n---\n")
    data = read_task(DataSpec(name, str(tmp_path)))
    assert (len(data.train), len(data.test)) == (3, 2)
    assert tuple(data.test[0][column] for column in task.text_columns) == texts
    assert data.test[0]["labels"] == pytest.approx(label)


def test_task_that_datasets_saved_to_disk_is_read_back(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 0]})
    unlabelled = Dataset.from_dict({"sentence": ["d"], "label": [-1]})
    DatasetDict({"train": rows, "validation": rows.select([1]), "test": unlabelled}).save_to_disk(tmp_path)
    data = read_task(DataSpec("sst2", str(tmp_path)))
    assert data.train["labels"][:] == [0, 1, 0] and data.test["sentence"][:] == ["b"]


def test_default_path_asks_the_hub_for_the_task_as_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str) -> dict[str, Dataset]:
        asked.append((path, config))
        rows = Dataset.from_dict({"sentence": ["a", "b"], "label": [0, 1]})
        return {"train": rows, "validation": rows, "test": rows}

    monkeypatch.setattr("distill_llm.data.sources.load_dataset", load_dataset)
    assert read_task(DataSpec("sst2")).test["labels"][:] == [0, 1]
    assert asked == [("nyu-mll/glue", "sst2")]


def test_incomplete_lines_and_pairs_without_gold_label_are_left_out(tmp_path: Path) -> None:
    header, row, _, _ = OFFICIAL["mnli"]
    assert header
    rows = [row, row[:-1], [*row[:-1], "-"], row]
    assert len(read_task(DataSpec("mnli", str(write(tmp_path, "mnli", rows)))).train) == 2


def test_rows_end_only_at_line_feeds(tmp_path: Path) -> None:
    data = read_task(DataSpec("sst2", str(write(tmp_path, "sst2", [["a\x85b\u2028c\rd", "1"], ["d", "0"]]))))
    assert data.train["sentence"][:] == ["a\x85b\u2028c\rd", "d"]


def test_real_files_have_all_their_rows_and_known_class_shares(glue_dir: Path) -> None:
    sizes = {"cola": ("CoLA", 8551, 1043), "mrpc": ("MRPC", 3668, 408), "stsb": ("STS-B", 5749, 1500)}
    for name, (folder, train, dev) in sizes.items():
        data = read_task(DataSpec(name, str(glue_dir / folder)))
        assert (len(data.train), len(data.test)) == (train, dev)
        if name == "mrpc":
            assert sum(data.test["labels"]) == 279  # 68.4% of the pairs are paraphrases, as published
        if name == "stsb":
            assert min(data.train["labels"]) >= 0 and max(data.train["labels"]) == 5


def test_holdout_leaves_train_and_does_not_depend_on_train_examples(tmp_path: Path) -> None:
    rows = [[f"text {i}", str(i % 2)] for i in range(50)]
    folder = str(write(tmp_path, "sst2", rows))
    data = read_task(DataSpec("sst2", folder, holdout_examples=10, seed=3))
    few = read_task(DataSpec("sst2", folder, holdout_examples=10, train_examples=5, seed=3))
    assert data.validation and few.validation
    assert data.validation["sentence"][:] == few.validation["sentence"][:]
    assert sorted([*data.train["sentence"], *data.validation["sentence"]]) == sorted(row[0] for row in rows)
    assert len(few.train) == 5 and not {*few.train["sentence"]} & {*few.validation["sentence"]}
    other = read_task(DataSpec("sst2", folder, holdout_examples=10, seed=4))
    assert other.validation and other.validation["sentence"][:] != data.validation["sentence"][:]


@pytest.mark.parametrize(
    ("task", "rows", "options", "field", "words"),
    [
        ("sst-2", None, {}, "data.task", "'sst2' (the nearest)"),
        ("sst2", [["a", "2"]], {}, "data.path", "labels 0 to 1"),
        ("sst2", None, {"columns": {"text": "x"}}, "data.columns", "classification"),
        ("sst2", None, {"train_examples": 5}, "data.train_examples", "1 to 4"),
        ("sst2", None, {"holdout_examples": 4}, "data.holdout_examples", "0 to 3"),
        ("rte", None, {}, "data.path", "'sentence1' is missing"),
        ("mnli", None, {}, "data.path", "lacks"),
    ],
)
def test_bad_input_is_one_line_naming_the_field(
    task: str, rows: list | None, options: dict, field: str, words: str, tmp_path: Path
) -> None:
    folder = write(tmp_path, "sst2", rows)
    if task == "mnli":
        write(tmp_path, "mnli")
        (tmp_path / "dev_matched.tsv").unlink()
    with pytest.raises(InputError) as caught:
        read_task(DataSpec(task, str(folder), **options))
    assert caught.value.field == field and words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./nowhere", "/no/such/folder", "no-such-owner/no-such-data"])
def test_missing_data_is_one_line(path: str) -> None:
    with pytest.raises(InputError) as caught:
        read_task(DataSpec("sst2", path))
    assert caught.value.field == "data.path" and "\n" not in str(caught.value)


def test_folder_without_task_files_names_the_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.tsv and dev\.tsv"):
        read_task(DataSpec("sst2", str(tmp_path)))


def test_bytes_that_are_not_utf_8_are_said_with_what_to_do(tmp_path):
    (tmp_path / "dev.tsv").write_bytes("sentence\tlabel\ncafé\t1\n".encode("cp1252"))
    with pytest.raises(InputError, match="^data.path: got .*dev.tsv'; save it as UTF-8 "):
        read_task(DataSpec("sst2", str(tmp_path)), training=False)
