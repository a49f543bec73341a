"""The nine GLUE tasks, from the Hub or from a local folder in the official TSV layout."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value

from distill_llm.common.errors import InputError, first_line
from distill_llm.data.kinds.classification import classification
from distill_llm.data.kinds.regression import regression
from distill_llm.data.sources import is_saved, read_splits
from distill_llm.data.splitting import Splits
from distill_llm.data.tasks import Task

HUB_ID = "nyu-mll/glue"

_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")

GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        classification("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy")),
        classification("sst2", ("sentence",), ("negative", "positive")),
        classification("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        regression("stsb", _PAIR),
        classification("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        classification("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
        classification("qnli", ("question", "sentence"), _ENTAILS),
        classification("rte", _PAIR, _ENTAILS),
        classification("wnli", _PAIR, ("not_entailment", "entailment")),
    )
}
"""The nine GLUE tasks (Wang et al. 2018), columns and class ids as in the Hub's `nyu-mll/glue`."""
NAMES = dict(zip(GLUE, ("CoLA", "SST-2", "MRPC", "STS-B", "QQP", "MNLI", "QNLI", "RTE", "WNLI"), strict=True))
"""What the tasks are called in papers, and their official folders; in the order of GLUE's table."""
MISMATCHED = replace(GLUE["mnli"], name="mnli_mismatched")
"""MNLI scored on texts of other sources than those of its training rows."""


@dataclass(frozen=True)
class Layout:
    """The official TSV files of one task.

    Attributes:
        columns: the header names of the text columns, in the order of `Task.text_columns`, then of the label column.
        dev: the file name of the development set.
        header: the column names of files that come without a header line.
    """

    columns: tuple[str, ...]
    dev: str = "dev.tsv"
    header: tuple[str, ...] | None = None


LAYOUTS = {
    "cola": Layout(("sentence", "label"), header=("source", "label", "mark", "sentence")),
    "sst2": Layout(("sentence", "label")),
    "mrpc": Layout(("#1 String", "#2 String", "Quality")),
    "stsb": Layout(("sentence1", "sentence2", "score")),
    "qqp": Layout(("question1", "question2", "is_duplicate")),
    "mnli": Layout(("sentence1", "sentence2", "gold_label"), dev="dev_matched.tsv"),
    "qnli": Layout(("question", "sentence", "label")),
    "rte": Layout(("sentence1", "sentence2", "label")),
    "wnli": Layout(("sentence1", "sentence2", "label")),
}
LAYOUTS[MISMATCHED.name] = replace(LAYOUTS["mnli"], dev="dev_mismatched.tsv")


def load_glue(name: str, path: str | None, training: bool = True) -> Splits:
    """`train` and `test` (the official development set; for MNLI the matched one) of a GLUE task.

    Args:
        name: a key of `GLUE`, or that of `MISMATCHED`.
        path: a folder with `train.tsv` and `dev.tsv`, a Hub id, or a folder laid out as its repository or saved by `datasets`;
            None for the Hub's copy.
        training: whether `train` is wanted; without it there is `test` alone.

    Raises:
        InputError: a missing folder, file or column, or a label that is not one of the task's.
    """
    task, layout = {**GLUE, MISMATCHED.name: MISMATCHED}[name], LAYOUTS[name]
    folder = Path(path) if path else None
    if folder and folder.is_dir() and ((folder / "train.tsv").is_file() or (folder / layout.dev).is_file()):
        files = {"train": folder / "train.tsv", "test": folder / layout.dev}
        return {split: read_tsv(file, task) for split, file in files.items() if training or split == "test"}
    readable = folder and (is_saved(folder) or (folder / "README.md").is_file() or any(folder.rglob("*.parquet")))
    if folder and folder.is_dir() and not readable:
        raise InputError("data.path", path, f"a folder with train.tsv and {layout.dev}")
    if folder and folder.is_file():
        raise InputError("data.path", path, f"a folder with train.tsv and {layout.dev}, or a Hub id")
    found = read_splits(path or HUB_ID, "mnli" if task is MISMATCHED else name, training=training)
    dev = "mismatched" if task is MISMATCHED else "validation"
    if dev not in found:
        wanted = "validation_mismatched" if task is MISMATCHED else "validation"
        raise InputError("data.path", path or HUB_ID, f"GLUE data with a split {wanted}")
    hub = {"train": "train", "test": dev}
    return {split: _from_hub(found[own], task) for split, own in hub.items() if training or split == "test"}


def read_tsv(file: Path, task: Task) -> Dataset:
    """Rows of one official TSV file: the task's text columns and `labels`.

    Quotes are ordinary characters in these files. Lines with fewer fields than the header (a few in QQP) and MNLI's
    pairs without a gold label are left out, as the Hub's copy does.

    Raises:
        InputError: the file or a column is missing, no row is left, or a label is not one of the task's.
    """
    if not file.is_file():
        raise InputError("data.path", str(file), "an existing file (the folder lacks it)")
    layout = LAYOUTS[task.name]
    try:
        with open(file, encoding="utf-8-sig", newline="\n") as text:
            rows = [line.rstrip("\r\n").split("\t") for line in text]
    except UnicodeError as error:
        raise InputError("data.path", str(file), fix=f"save it as UTF-8 ({first_line(error)})") from error
    header = list(layout.header or (rows.pop(0) if rows else ()))
    if missing := [column for column in layout.columns if column not in header]:
        raise InputError("data.path", str(file), f"the columns {', '.join(layout.columns)} ({missing[0]!r} is missing)")
    places = [header.index(column) for column in layout.columns]
    complete = [row for row in rows if len(row) >= len(header) and row[places[-1]] != "-"]
    if not complete:
        raise InputError("data.path", str(file), "a file with at least one complete row")
    columns: dict[str, list[Any]] = {
        column: [row[place] for row in complete] for column, place in zip(task.text_columns, places, strict=False)
    }
    to_label = label_reader(task, str(file))
    columns["labels"] = [to_label(row[places[-1]]) for row in complete]
    return Dataset.from_dict(columns, features=_features(task))


def label_reader(task: Task, where: str) -> Callable[[Any], int | float]:
    """A function from a label as written (a class id, a class name, a number) to the value in `labels`."""
    if task.label_names is None:

        def to_float(given: Any) -> float:
            try:
                return float(given)
            except (TypeError, ValueError):
                raise InputError("data.path", given, f"numbers as labels of {task.name} in {where}") from None

        return to_float
    names = task.label_names
    known: dict[Any, int] = {name: number for number, name in enumerate(names)}
    known |= {str(number): number for number in range(len(names))} | {number: number for number in range(len(names))}

    def to_class(given: Any) -> int:
        if given not in known:
            accepted = f"labels 0 to {len(names) - 1} or {', '.join(names)} for {task.name} in {where}"
            raise InputError("data.path", given, accepted)
        return known[given]

    return to_class


def _from_hub(rows: Dataset, task: Task) -> Dataset:
    if missing := [column for column in (*task.text_columns, "label") if column not in rows.column_names]:
        wanted = ", ".join((*task.text_columns, "label"))
        raise InputError("data.path", ", ".join(rows.column_names), f"the columns {wanted} ({missing[0]!r} is missing)")
    to_label = label_reader(task, "the data set")
    labels = [to_label(label) for label in rows["label"]]
    kept = rows.select_columns(list(task.text_columns)).add_column("labels", labels)
    return kept.cast(_features(task))


def _features(task: Task) -> Features:
    label = Value("float32") if task.label_names is None else Value("int64")
    return Features({**{column: Value("string") for column in task.text_columns}, "labels": label})
