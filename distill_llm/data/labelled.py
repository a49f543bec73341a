"""Labelled rows of any file, folder or Hub id: columns by name, splits, texts as token ids."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, Json, LargeList, List, Value
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, one_of
from distill_llm.data.complete import complete
from distill_llm.data.cutting import cut_text
from distill_llm.data.padding import LENGTH, Rows
from distill_llm.data.sources import read_splits
from distill_llm.data.spec import DataSpec
from distill_llm.data.splitting import Splits, same_class, with_test

TEACHER_OF = "teacher_of"
"""A column that says which of several teachers teaches a row; training rows alone have it."""
COLUMNS = ("text", "text_pair", "label", TEACHER_OF)
TEXTS = "texts"


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
            columns |= teacher_names(rows, of_split(self.names, split))
            labels = to_labels(rows[self.names["label"]], split)
            made[split] = Dataset.from_dict({**columns, "labels": labels})
        return made


def read_labelled(spec: DataSpec, training: bool = True, words: bool = False, classes: bool = False) -> LabelledRows:
    """Rows of the user's own data with the columns `text`, `text_pair` (optional) and `label`.

    Where no labelled test split exists, the validation split takes its place; where there is neither, a fixed tenth of the
    training rows.

    Args:
        spec: its path, columns, format of files and treatment of incomplete rows are read.
        training: as of `read_splits`.
        words: whether a text is a list of words, not checked here.
        classes: whether labels are classes, each of which then gives a tenth of its rows.

    Raises:
        InputError: a column is missing, or is not text; a row lacks a value.
    """
    assert spec.path is not None
    names = column_names(spec.columns, ("text", "label"))
    splits = read_splits(spec.path, training=training, form=spec.form)
    for split, rows in splits.items():
        check_columns(rows, of_split(names, split), split)
    if len(splits) > 1 and "test" in splits and _unlabelled(splits["test"][names["label"]]):
        del splits["test"]
    for split, rows in splits.items():
        splits[split] = complete(rows, of_split(names, split), split, spec.drop_incomplete)
        if not words:
            _check_labels(rows, names["label"], split)
            check_texts(splits[split], {name: names[name] for name in COLUMNS[:2] if name in names}, split)
    return LabelledRows(names, with_test(splits, names["label"] if classes else None))


def _check_labels(rows: Dataset, column: str, split: str) -> None:
    """Raise InputError where a label is not one word or number."""
    if not isinstance(rows.features[column], Value | ClassLabel):
        accepted = f"a column with one word or number in every row; the {split} split has {content_of(rows, column)}"
        raise InputError("data.columns.label", column, accepted)


def _unlabelled(labels: Sequence[Any]) -> bool:
    """Whether a split has no labels: the Hub writes -1 for a hidden one."""
    return all(label in (-1, None, "") for label in labels)


def of_split(names: Mapping[str, str], split: str) -> dict[str, str]:
    """The columns that a split must have."""
    return {name: column for name, column in names.items() if name != TEACHER_OF or split == "train"}


def teacher_names(rows: Dataset, names: Mapping[str, str]) -> dict[str, list[str]]:
    """The column TEACHER_OF as words, where `names` has it: numbers may be names too."""
    return {TEACHER_OF: [str(same_class(name)) for name in rows[names[TEACHER_OF]]]} if TEACHER_OF in names else {}


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
    """Raise InputError where a column is not text."""
    for name, column in names.items():
        if (held := content_of(rows, column)) != TEXTS:
            raise InputError(f"data.columns.{name}", column, f"a column of texts; the {split} split has {held}")


def content_of(rows: Dataset, column: str) -> str:
    """What a column holds, in words: TEXTS, or anything else that files can have."""
    feature = rows.features[column]
    if isinstance(feature, dict):
        by_row = len(rows) == 1 and all(str(key).isdigit() for key in feature)
        write = ' (from pandas, write to_json(..., orient="records", lines=True))' if by_row else ""
        return f"mappings{write}"
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        return TEXTS
    if isinstance(feature, List | LargeList):
        return "lists"
    if isinstance(feature, Json):
        return "values of several kinds"
    return f"{feature.dtype} values" if isinstance(feature, Value) else f"{type(feature).__name__} values"


def text_encoder(
    columns: tuple[str, ...], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Callable[[Rows], Rows]:
    """A function from rows of one or two texts and `labels` to token ids between special tokens, cut to `max_length`."""

    def work(rows: Rows) -> Rows:
        kept = {name: rows[name] for name in ("labels", TEACHER_OF) if name in rows}
        texts = [[cut_text(text, tokenizer, max_length) for text in rows[column]] for column in columns]
        result = dict(tokenizer(*texts, truncation=True, max_length=max_length))
        return {**result, **kept, LENGTH: [len(ids) for ids in result["input_ids"]]}

    return work
