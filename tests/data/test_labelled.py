"""Labelled data by file or folder with named columns."""

from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset
from transformers import BertConfig, BertTokenizer

from distill_llm.common.errors import InputError
from distill_llm.data import DataSpec, encode
from distill_llm.data.loading import read_task

ROWS = {"q": ["a", 'b "', "NA", "d"] * 5, "r": ["w", "x", "y", "z"] * 5, "kind": ["no", "yes", "maybe", "yes"] * 5}
COLUMNS = {"text": "q", "text_pair": "r", "label": "kind"}


def write(file: Path, rows: dict[str, list]) -> Path:
    data = Dataset.from_dict(rows)
    if file.suffix == ".parquet":
        data.to_parquet(file)
    elif file.suffix in (".json", ".jsonl"):
        data.to_json(file)
    elif file.suffix == ".csv":
        data.to_csv(file)
    else:
        lines = [list(rows), *zip(*rows.values(), strict=True)]
        file.write_text("\n".join("\t".join(map(str, line)) for line in lines))
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
def test_every_kind_of_file_gives_the_same_pairs_and_classes(suffix: str, tmp_path: Path) -> None:
    data = read_task(DataSpec("classification", str(write(tmp_path / f"a{suffix}", ROWS)), columns=COLUMNS))
    assert data.task.label_names == ("maybe", "no", "yes") and data.task.text_columns == ("text", "text_pair")
    got = [tuple(row.values()) for rows in (data.train, data.test) for row in rows]
    wanted = [(q, r, ("maybe", "no", "yes").index(k)) for q, r, k in zip(*ROWS.values(), strict=True)]
    assert sorted(got) == sorted(wanted) and len(data.test) == 2


def test_folder_of_split_files_keeps_its_splits(tmp_path: Path) -> None:
    for split, size in {"train": 8, "dev": 4, "test": 6}.items():
        write(
            tmp_path / f"{split}.csv", {"text": [f"{split} {i}" for i in range(size)], "label": [3, 12] * (size // 2)}
        )
    data = read_task(DataSpec("classification", str(tmp_path)))
    assert data.validation and (len(data.train), len(data.validation), len(data.test)) == (8, 4, 6)
    assert data.task.label_names == ("3", "12") and data.test["labels"][:2] == [0, 1]
    fewer = read_task(DataSpec("classification", str(tmp_path), holdout_examples=2))
    assert fewer.validation and (len(fewer.train), len(fewer.validation)) == (8, 2)


def test_unlabelled_test_split_is_replaced_by_validation(tmp_path: Path) -> None:
    for split, label in {"train": 1, "validation": 0, "test": -1}.items():
        write(
            tmp_path / f"{split}.jsonl", {"text": [split] * 4, "label": [label, 0, 1, -1] if label >= 0 else [-1] * 4}
        )
    with pytest.raises(InputError, match="got -1"):
        write(tmp_path / "train.jsonl", {"text": ["a"] * 2, "label": [0, 1]})
        read_task(DataSpec("classification", str(tmp_path)))
    write(tmp_path / "validation.jsonl", {"text": ["validation"] * 2, "label": [0, 1]})
    data = read_task(DataSpec("classification", str(tmp_path)))
    assert data.test["text"][:] == ["validation"] * 2 and data.validation is None


def test_regression_labels_are_numbers(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", {"text": ["a", "b", "c"], "score": [1, 2.5, 4]})
    data = read_task(DataSpec("regression", str(file), columns={"text": "text", "label": "score"}))
    assert data.task.num_labels == 1 and sorted([*data.train["labels"], *data.test["labels"]]) == [1.0, 2.5, 4.0]


@pytest.mark.parametrize(
    ("task", "rows", "columns", "field"),
    [
        ("classification", {"text": ["a", "b"], "labels": [0, 1]}, None, "data.columns.label"),
        ("classification", {"text": [1, 2], "label": [0, 1]}, None, "data.columns.text"),
        ("classification", {"text": ["a", "b"], "label": [0.5, 1.5]}, None, "data.columns.label"),
        ("classification", {"text": ["a", "b"], "label": ["x", "x"]}, None, "data.columns.label"),
        ("regression", {"text": ["a", "b"], "label": ["1", "many"]}, None, "data.columns.label"),
        ("regression", {"text": ["a", "b"], "label": [1, 2]}, {"txt": "text"}, "data.columns"),
    ],
)
def test_unusable_columns_are_one_line_naming_the_field(
    task: str, rows: dict, columns: dict | None, field: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        read_task(DataSpec(task, str(write(tmp_path / "a.csv", rows)), columns=columns))
    assert caught.value.field == field and "\n" not in str(caught.value)


def test_path_is_needed_and_must_be_readable(tmp_path: Path) -> None:
    (tmp_path / "a.xml").write_text("<a/>")
    (tmp_path / "a.jsonl").write_text("{not json")
    for path in (None, str(tmp_path / "a.xml"), str(tmp_path / "a.jsonl"), str(tmp_path / "no.csv")):
        with pytest.raises(InputError) as caught:
            read_task(DataSpec("classification", path))
        assert caught.value.field == "data.path" and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["words", "capitals", "ClassLabel"])
def test_classes_are_in_the_order_of_a_model_that_has_the_same_ones(kind: str, tmp_path: Path) -> None:
    words, model = ("no", "yes", "maybe"), BertConfig(id2label={0: "yes", 1: "maybe", 2: "no"})
    said = [word.upper() if kind == "capitals" else word for word in words]
    for split in ("train", "test"):
        rows = Dataset.from_dict({"text": [f"{word} {split}" for word in words], "label": said})
        if kind == "ClassLabel":
            rows = rows.cast_column("label", ClassLabel(names=list(words)))
        rows.to_parquet(tmp_path / f"{split}.parquet")
    data = read_task(DataSpec("classification", str(tmp_path)), model)
    assert data.task.label_names == ("yes", "maybe", "no")
    for rows in (data.train, data.test):
        assert [(text.split()[0], label) for text, label in zip(rows["text"], rows["labels"], strict=True)] == [
            ("no", 2), ("yes", 0), ("maybe", 1)
        ]  # fmt: skip


@pytest.mark.parametrize(
    "names",
    [("yes", "no"), ("yes", "no", "maybe", "never"), ("yes", "no", "perhaps"), ("LABEL_0", "LABEL_1", "LABEL_2")],
)
def test_classes_that_are_not_the_models_are_numbered_in_alphabetical_order(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    file, config = write(tmp_path / "a.csv", ROWS), BertConfig(id2label=dict(enumerate(names)))
    assert read_task(DataSpec("classification", str(file), columns=COLUMNS), config).task.label_names == (
        "maybe", "no", "yes"
    )  # fmt: skip


def test_class_ids_are_those_of_the_model_whatever_it_calls_them(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", {"text": ["a", "b", "c", "d"], "label": [1, 0, 1, 0]})
    data = read_task(DataSpec("classification", str(file)), BertConfig(id2label={0: "yes", 1: "no"}))
    for rows in (data.train, data.test):
        assert all(label == (text in "ac") for text, label in zip(rows["text"], rows["labels"], strict=True))


def test_rows_encoded_for_one_order_of_the_classes_are_not_read_for_another(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", {"text": ["good", "bad"] * 5, "label": ["pos", "neg"] * 5})
    tokenizer = BertTokenizer(
        vocab={word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad"])}
    )
    for order in (("pos", "neg"), ("neg", "pos")):
        data = read_task(DataSpec("classification", str(file)), BertConfig(id2label=dict(enumerate(order))))
        rows = encode(data, tokenizer, 8).train
        assert all(order[row["labels"]] == ("pos" if 4 in row["input_ids"] else "neg") for row in rows)
