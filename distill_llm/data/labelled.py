"""Labelled rows of any file, folder or Hub id: columns by name, splits, texts as token ids."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, one_of
from distill_llm.data.padding import LENGTH, Rows
from distill_llm.data.sources import Splits, read_splits
from distill_llm.data.spec import DataSpec

TEST_SHARE = 0.1
TEST_SEED = 0
COLUMNS = ("text", "text_pair", "label")


@dataclass(frozen=True)
class LabelledRows:
    """Rows with one or two columns of text and one of labels, as the data have them.

    Attributes:
        names: our name of a column -> the data's.
        splits: `train`, `test` and perhaps `validation`.
    """

    names: Mapping[str, str]
    splits: Splits

    @property
    def texts(self) -> tuple[str, ...]:
        """Our names of the columns of text that there are."""
        return tuple(name for name in COLUMNS[:2] if name in self.names)

    def with_labels(self, to_labels: Callable[[Sequence[Any], str], Sequence[Any]]) -> Splits:
        """The splits with the columns of text, under our names, and `labels`.

        Args:
            to_labels: from the values of a split's label column, and the split's name, to its labels.
        """
        made = {}
        for split, rows in self.splits.items():
            columns = {name: list(rows[self.names[name]]) for name in self.texts}
            labels = to_labels(rows[self.names["label"]], split)
            made[split] = Dataset.from_dict({**columns, "labels": labels})
        return made


def read_labelled(spec: DataSpec, training: bool = True, words: bool = False) -> LabelledRows:
    """Rows of the user's own data with the columns `text`, `text_pair` (optional) and `label`.

    Where no labelled test split exists, the validation split takes its place; where there is neither, a fixed tenth of the
    training rows.

    Args:
        spec: its path and columns are read.
        training: as of `read_splits`.
        words: whether a text is a list of words, not checked here.

    Raises:
        InputError: a column is missing, or is not text.
    """
    assert spec.path is not None
    names = column_names(spec.columns, ("text", "label"))
    splits = read_splits(spec.path, training=training)
    for split, rows in splits.items():
        check_columns(rows, names, split)
        if not words:
            check_texts(rows, {name: column for name, column in names.items() if name != "label"}, split)
    if len(splits) > 1 and "test" in splits and _unlabelled(splits["test"][names["label"]]):
        del splits["test"]
    return LabelledRows(names, with_test(splits))


def _unlabelled(labels: Sequence[Any]) -> bool:
    """Whether a split has no labels: the Hub writes -1 for a hidden one."""
    return all(label in (-1, None, "") for label in labels)


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
            "data.path", f"{len(rows)} rows", "at least 2 rows, because a tenth of them becomes the test split"
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


def check_columns(rows: Dataset, names: Mapping[str, str], split: str) -> None:
    """Raise InputError where a column is missing."""
    for name, column in names.items():
        if column not in rows.column_names:
            accepted = one_of(rows.column_names, column) + f" (the {split} split)"
            raise InputError(f"data.columns.{name}", column, accepted)


def check_texts(rows: Dataset, names: Mapping[str, str], split: str) -> None:
    """Raise InputError where a column is missing or has no text in some row."""
    check_columns(rows, names, split)
    for name, column in names.items():
        is_text = rows.features[column].dtype in ("string", "large_string")
        if not is_text or rows.data.column(column).null_count:
            raise InputError(f"data.columns.{name}", column, f"a column with a text in every row (the {split} split)")


def text_encoder(
    columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[Rows], Rows]:
    """A function from rows of one or two texts and `labels` to token ids between special tokens, cut to `max_length`."""

    def work(rows: Rows) -> Rows:
        texts = [rows[column] for column in columns]
        result = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        return {**result, "labels": rows["labels"], LENGTH: [len(ids) for ids in result["input_ids"]]}

    return work
