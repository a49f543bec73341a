"""Which rows of a grid of parameters are enough for the fast tests."""

from collections.abc import Hashable, Sequence
from itertools import combinations
from typing import Any

import pytest

# Families that differ in what matters: norms, attention, fused weights, gates, groups, soft caps.
LAYOUTS = frozenset({"bert", "deberta-v2", "modernbert", "llama", "gemma2", "gpt2", "phi3", "falcon-grouped"})


def slow(*values: Any) -> list:
    """Parameters of a test, all of them slow; a tuple is a row of several."""
    rows = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*row, marks=pytest.mark.slow) for row in rows]


def layouts_first(values: Sequence[str | tuple]) -> list:
    """Parameters of a test, families or rows that begin with one: those of no family in LAYOUTS are slow."""
    fast = [value for value in values if (value[0] if isinstance(value, tuple) else value) in LAYOUTS]
    return [*fast, *slow(*(value for value in values if value not in fast))]


def covering(rows: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    """Places of rows that together have every combination of `strength` values that any row has.

    Args:
        rows: the values of each row, at the same places in each.
        strength: 1: every value stands in one of the rows; 2: every pair of values of two places.
    """

    def parts(row: Sequence[Hashable]) -> set[tuple]:
        return set(combinations(enumerate(row), min(strength, len(row))))

    left = set().union(*map(parts, rows))
    chosen: list[int] = []
    while left:
        best = max(range(len(rows)), key=lambda i: len(parts(rows[i]) & left))
        chosen.append(best)
        left -= parts(rows[best])
    return sorted(chosen)


def thin(items: list[pytest.Item]) -> None:
    """Mark as slow what a test's mark `grid(strength)` leaves out of the fast tests."""
    grids: dict[tuple[str, int], list[pytest.Function]] = {}
    for item in items:
        mark = item.get_closest_marker("grid")
        if mark is not None and isinstance(item, pytest.Function):
            grids.setdefault((item.nodeid.partition("[")[0], *mark.args), []).append(item)
    for (_, strength), tests in grids.items():
        fast = [test for test in tests if test.get_closest_marker("slow") is None]
        rows = [tuple(map(repr, test.callspec.params.values())) for test in fast]
        kept = set(covering(rows, strength))
        for place, test in enumerate(fast):
            if place not in kept:
                test.add_marker(pytest.mark.slow)
