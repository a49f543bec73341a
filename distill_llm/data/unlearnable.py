"""Rows that cannot be learnt as they are: found where they are encoded, counted, and refused by their numbers."""

from collections.abc import Iterable, Sequence

import numpy as np
from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.data.complete import numbered

NUMBER = "number"
"""A column of places that an encoder is given beside the rows: where each is in the data."""
FAULT = "fault"
"""A column that an encoder may make: what is wrong with a row (`fault_of`), or nothing."""

FAULTS = {
    "shared": (
        "a prompt and a response that share the token {}",
        "move the space or line end between them to the beginning of the response, or divide them between two words",
    ),
    "joined": (
        "an answer that shares the token {} with the words of the chat template before it",
        "remove the white space with which the answer begins",
    ),
    "dropped": (
        "an answer of which the chat template leaves out {}",
        "remove that part from the answer, or give the tokenizer a chat template that keeps it",
    ),
    "refused": ("a chat that the chat template refuses ({})", "change these rows, or remove them"),
    "changed": (
        "a chat whose question the chat template writes otherwise before the answer {}",
        "remove thoughts that `data.chat_template_kwargs` turns off, or use a template that leaves questions as they are",
    ),
    "edited": (
        "a response that is not the text of its response_ids ({})",
        "remove `response_ids` from these rows, to train on their texts",
    ),
}
"""By kind: what is given, with what was seen of it in the first row; what to do."""
LONGEST = 60


def fault_of(number: int, kind: str, seen: str) -> str:
    """A fault as the column FAULT has it.

    Args:
        number: the place of the row.
        kind: one of FAULTS.
        seen: what shows the fault.
    """
    return f"{number} {kind} {seen if len(seen) <= LONGEST else seen[:LONGEST] + '...'!r}"


def unlearnable(faults: Iterable[str]) -> list[InputError]:
    """The faults of rows, each kind once, from the values of their column FAULT."""
    found: dict[str, tuple[str, list[int]]] = {}
    for fault in filter(None, faults):
        number, kind, seen = fault.split(" ", 2)
        found.setdefault(kind, (seen, []))[1].append(int(number))
    errors = []
    for kind, (seen, places) in found.items():
        given, fix = FAULTS[kind]
        errors.append(
            InputError("data.path", f"{given.format(seen)} in {numbered(sorted(places))} of the rows", fix=fix)
        )
    return errors


def places_of(rows: Dataset, numbers: Sequence[int]) -> list[int]:
    """Where rows are in the data that a dataset was chosen from (by a split or a draw)."""
    chosen = rows._indices
    return [*numbers] if chosen is None else np.asarray(chosen.column(0))[[*numbers]].tolist()
