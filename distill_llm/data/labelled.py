"""Any labelled data, and plain text, by file, folder or Hub id with named columns."""

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from datasets import ClassLabel, Dataset

from distill_llm.common.errors import InputError, one_of
from distill_llm.data.sources import Splits, read_splits
from distill_llm.data.tasks import Task, causal_lm, classification, masked_lm, regression

TEST_SHARE = 0.1
TEST_SEED = 0
COLUMNS = ("text", "text_pair", "label")


def load_labelled(
    kind: str,
    path: str,
    columns: Mapping[str, str] | None,
    training: bool = True,
    known: Sequence[str] | None = None,
) -> tuple[Task, Splits]:
    """A classification or regression task from data with a column (or two) of text and one of labels.

    Classes are in the order of the model that the data are for, where it has the same ones by name. Else they come from the
    data: a `ClassLabel` column's own, else the sorted values of the training rows. Where no labelled test split exists, the
    validation split takes its place; where there is neither, a fixed tenth of the training rows.

    Args:
        kind: `classification` or `regression`.
        path: what `read_splits` takes.
        columns: the data's names of `text`, `text_pair` (optional) and `label`; by default the same words.
        training: as of `read_splits`.
        known: the classes of a model, in its order; data without training rows may have some of them only, by name or number.

    Returns:
        The task and its splits `train`, `test` and perhaps `validation`, with columns `text`, `text_pair` if any,
        `labels`.

    Raises:
        InputError: a column is missing or is not text, or a label is missing, no number, or unknown to the training
            rows.
    """
    names = column_names(columns, ("text", "label"))
    splits = read_splits(path, training=training)
    for split, rows in splits.items():
        check_texts(rows, names, split)
    if (
        len(splits) > 1
        and "test" in splits
        and all(label in (-1, None, "") for label in splits["test"][names["label"]])
    ):
        del splits["test"]
    splits = with_test(splits)
    texts = tuple(column for column in COLUMNS[:2] if column in names)
    if kind == "regression":
        task, to_labels = regression("regression", texts), None
    else:
        class_names, to_labels = _task_classes(splits, names["label"], known)
        task = classification("classification", texts, class_names, ("accuracy", "f1"))
    return task, {split: _labelled(rows, names, to_labels, split) for split, rows in splits.items()}


def load_text(
    path: str,
    columns: Mapping[str, str] | None,
    causal: bool = False,
    training: bool = True,
    join_rows: bool = False,
) -> tuple[Task, Splits]:
    """A language-modelling task from documents: `.txt` files, or any data with a column of text (`text` unless `columns`
    says otherwise).

    It is masked LM, or causal LM with `causal`. Splits are made as by `load_labelled`. With `join_rows` rows are lines of longer
    documents: each 1,000 that follow one another are made one, parted by blank lines, as where perplexities on WikiText are
    published (GPTQ, Frantar et al., 2023, and after it); without a test split the last tenth of the lines is set apart.

    Raises:
        InputError: nothing readable at `path`, or no such column of text.
    """
    names = column_names(columns, ("text",))
    if extra := set(names) - {"text"}:
        raise InputError("data.columns", extra.pop(), "'text' (plain text has no other column)")
    splits = read_splits(path, training=training)
    for split, rows in splits.items():
        check_texts(rows, names, split)
    column = names["text"]
    kept = {split: rows.select_columns([column]) for split, rows in splits.items()}
    if join_rows:
        kept = {split: _joined(rows, column) for split, rows in _with_last_tenth(kept).items()}
    kept = with_test(kept)
    return (causal_lm if causal else masked_lm)("text", names["text"]), kept


def _with_last_tenth(splits: Splits) -> Splits:
    """The splits of lines with one to test on, in the order that they have."""
    if {"test", "validation"} & splits.keys() or len(rows := splits["train"]) < 2:
        return splits
    kept = len(rows) - max(1, int(len(rows) * TEST_SHARE))
    return {"train": rows.select(range(kept)), "test": rows.select(range(kept, len(rows)))}


def _joined(rows: Dataset, column: str) -> Dataset:
    return rows.map(_one_document, batched=True, batch_size=1000, fn_kwargs={"column": column})


def _one_document(rows: Mapping[str, list[str]], column: str) -> dict[str, list[str]]:
    return {column: ["\n\n".join(rows[column])]}


def with_test(splits: Splits) -> Splits:
    """The splits with a `test` among them: the validation split, or a fixed tenth of the training rows, where there is
    none.

    Raises:
        InputError: fewer than two rows to divide.
    """
    if "test" in splits:
        return splits
    if "validation" in splits:
        return {"test" if split == "validation" else split: rows for split, rows in splits.items()}
    rows = splits["train"]
    if len(rows) < 2:
        raise InputError(
            "data.path", f"{len(rows)} rows", "at least 2 rows, since a tenth of them is set apart as test split"
        )
    divided = rows.train_test_split(test_size=max(1, int(len(rows) * TEST_SHARE)), seed=TEST_SEED)
    return {"train": divided["train"], "test": divided["test"]}


def column_names(
    columns: Mapping[str, str] | None, needed: tuple[str, ...], known: tuple[str, ...] = COLUMNS
) -> dict[str, str]:
    """What the data call each column: by default as we do.

    Args:
        columns: our name -> the data's.
        needed: our names of columns that there must be.
        known: all our names that may be given.

    Raises:
        InputError: a name that is not known.
    """
    given = {name: column for name, column in (columns or {}).items() if column is not None}
    for name in given:
        if name not in known:
            raise InputError("data.columns", name, one_of(known, name))
    return {name: name for name in needed} | given


def check_texts(rows: Dataset, names: Mapping[str, str], split: str) -> None:
    """Raise InputError where a column is missing, or, but for `label`, has no text in some row."""
    for name, column in names.items():
        if column not in rows.column_names:
            raise InputError(
                f"data.columns.{name}", column, one_of(rows.column_names, column) + f" (the {split} split)"
            )
        if name != "label" and (
            rows.features[column].dtype not in ("string", "large_string") or rows.data.column(column).null_count
        ):
            raise InputError(f"data.columns.{name}", column, f"a column with a text in every row (the {split} split)")


def _whole(value: Any) -> Any:
    """Integers that a file format turned into floats, as integers again."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _class_values(rows: Dataset, column: str) -> list[Any]:
    values = {_whole(value) for value in rows.unique(column)}
    if None in values or "" in values or any(isinstance(value, float) for value in values):
        raise InputError("data.columns.label", column, "a column with a class (a word or an integer) in every row")
    return sorted(values)


def _class_names(rows: Dataset, column: str) -> dict[Any, str]:
    """What each value of the column is called: by its ClassLabel, else by itself."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    return {value: str(value) for value in _class_values(rows, column)}


def _task_classes(splits: Splits, column: str, known: Sequence[str] | None) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names of the classes in the order of their ids, and the id of each value of the column."""
    rows, known = splits.get("train", splits["test"]), tuple(known or ())
    names = _class_names(rows, column)
    ids, some = _ids_by_name(names, known), "train" not in splits and not isinstance(rows.features[column], ClassLabel)
    if known and ids is not None and (some or len(ids) == len(known) > 1):
        return known, ids
    if known and some and all(type(value) is int and 0 <= value < len(known) for value in names):
        return known, {value: value for value in names}
    if len(names) < 2:
        raise InputError("data.columns.label", column, "a column with at least two classes")
    return tuple(dict.fromkeys(names.values())), {value: number for number, value in enumerate(names)}


def _ids_by_name(names: Mapping[Any, str], known: Sequence[str]) -> dict[Any, int] | None:
    """The id of each value in a model that has a class of that name, in capitals or not; None where one has none."""
    order, given = ([name.casefold() for name in each] for each in (known, names.values()))
    if not {*given} <= {*order} or any(len({*each}) < len(each) for each in (order, given)):
        return None
    return {value: order.index(name) for value, name in zip(names, given, strict=True)}


def _labelled(rows: Dataset, names: Mapping[str, str], classes: dict[Any, int] | None, split: str) -> Dataset:
    labels: list[int] | list[float]
    given = [_whole(value) for value in rows[names["label"]]]
    if classes is None:
        labels = [_number(value, split) for value in given]
    else:
        if unknown := [value for value in given if value not in classes]:
            accepted = f"the classes {', '.join(map(str, classes))} of the training rows (found in the {split} split)"
            raise InputError("data.columns.label", unknown[0], accepted)
        labels = [classes[value] for value in given]
    columns: dict[str, Any] = {name: rows[column] for name, column in names.items() if name != "label"}
    return Dataset.from_dict({**{name: list(texts) for name, texts in columns.items()}, "labels": labels})


def _number(value: Any, split: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        raise InputError("data.columns.label", value, f"a number in every row (the {split} split)")
    return number
