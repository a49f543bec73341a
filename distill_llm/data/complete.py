"""Rows that lack a label or a text: named, or left out."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.common.notices import tell

SHOWN = 5
"""How many row numbers a message names."""


def complete(rows: Dataset, names: Mapping[str, str], split: str, drop: bool) -> Dataset:
    """The rows with a value in every column that the task reads.

    A text lacks where there is none (null); a label also where it is blank or not a number (NaN).

    Args:
        names: our name of a column -> the data's.
        split: what the rows are called in messages.
        drop: leave incomplete rows out, and say how many.

    Raises:
        InputError: incomplete rows that are not to be left out, by number; no row is complete.
    """
    lacking: dict[str, list[int]] = {}
    for name, column in names.items():
        if name != "label" and not rows.data.column(column).null_count:
            continue
        lacks = _no_label if name == "label" else _nothing
        if places := [place for place, value in enumerate(rows[column][:]) if lacks(value)]:
            lacking[name] = places
    if not lacking:
        return rows
    if not drop:
        name, places = next(iter(lacking.items()))
        fix = "fill them in, or set `data.drop_incomplete` to leave such rows out"
        raise InputError(f"data.columns.{name}", f"no value in {numbered(places)} of the {split} rows", fix=fix)
    left_out = sorted({place for places in lacking.values() for place in places})
    if len(left_out) == len(rows):
        raise InputError(f"data.columns.{next(iter(lacking))}", f"no value in any {split} row", "a column with values")
    tell(f"left out {numbered(left_out)} of {len(rows)} {split} rows, without {' or '.join(lacking)}")
    gone = set(left_out)
    return rows.select([place for place in range(len(rows)) if place not in gone])


def _nothing(value: Any) -> bool:
    return value is None


def _no_label(value: Any) -> bool:
    """Whether a label is null, blank, or not a number."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def numbered(places: list[int]) -> str:
    """`3 (numbers 4, 17 and 201)`: how many rows, and their numbers, counted from 1 without a header line."""
    numbers = [str(place + 1) for place in places[:SHOWN]]
    more = ", ..." if len(places) > SHOWN else ""
    return f"{len(places)} (number{'s' if len(places) > 1 else ''} {', '.join(numbers)}{more}, counted from 1)"
