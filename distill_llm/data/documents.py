"""Documents: what both kinds of language modelling on plain text read."""

from collections.abc import Mapping

from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.data.complete import complete
from distill_llm.data.labelled import check_columns, check_texts, column_names
from distill_llm.data.sources import read_splits
from distill_llm.data.spec import DataSpec
from distill_llm.data.splitting import TEST_SHARE, Splits, with_test

LINES = 1000
"""How many lines are joined to one document."""


def read_texts(spec: DataSpec, training: bool = True) -> tuple[str, Splits]:
    """Documents from `.txt` files, or from any data with a column of text (`text` unless the columns say otherwise).

    Splits are made as by `read_labelled`. With `join_rows`, rows are lines of longer documents: each 1,000 that follow one
    another are joined by blank lines, as where perplexities on WikiText are published (GPTQ, Frantar et al., 2023, and
    after it). Without a test split, the last tenth of the lines is then set apart.

    Returns:
        The name of the column, and the splits with that column alone.

    Raises:
        InputError: nothing readable at the path, or no such column of text.
    """
    assert spec.path is not None
    names = column_names(spec.columns, ("text",))
    if extra := set(names) - {"text"}:
        raise InputError("data.columns", extra.pop(), "only text: plain text has no other column")
    splits = read_splits(spec.path, training=training, form=spec.form)
    for split, rows in splits.items():
        check_columns(rows, names, split)
        splits[split] = complete(rows, names, split, spec.drop_incomplete)
        check_texts(rows, names, split)
    column = names["text"]
    kept = {split: rows.select_columns([column]) for split, rows in splits.items()}
    if spec.join_rows:
        kept = {split: _joined(rows, column) for split, rows in _with_last_tenth(kept).items()}
    return column, with_test(kept)


def _with_last_tenth(splits: Splits) -> Splits:
    """The splits of lines with one to test on, in the order that they have."""
    if {"test", "validation"} & splits.keys() or len(rows := splits["train"]) < 2:
        return splits
    kept = len(rows) - max(1, int(len(rows) * TEST_SHARE))
    return {"train": rows.select(range(kept)), "test": rows.select(range(kept, len(rows)))}


def _joined(rows: Dataset, column: str) -> Dataset:
    return rows.map(_one_document, batched=True, batch_size=LINES, fn_kwargs={"column": column})


def _one_document(rows: Mapping[str, list[str]], column: str) -> dict[str, list[str]]:
    return {column: ["\n\n".join(rows[column])]}
