"""Rows set apart from others: to score on, to choose settings by, or to be fewer."""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Value

from distill_llm.common.errors import InputError
from distill_llm.common.notices import tell

TEST_SHARE = 0.1
TEST_SEED = 0
CLASSES_SHOWN = 10
Splits = dict[str, Dataset]


def set_apart(
    rows: Dataset, count: int, seed: int, classes: Sequence[Hashable] | None = None
) -> tuple[Dataset, Dataset]:
    """The rows without those set apart, and those set apart, both in an order drawn with `seed`.

    Args:
        count: how many rows to set apart.
        classes: the class of every row: each class then loses the same share of its rows, as far as whole rows allow, and
            keeps one row at least. None: rows are drawn from all alike.
    """
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    if classes is None:
        return rows.select(order[count:]), rows.select(order[:count])
    left = shares_of(Counter(classes), count)
    apart: list[int] = []
    kept: list[int] = []
    for place in order:
        taken = left[classes[place]] > 0
        left[classes[place]] -= taken
        (apart if taken else kept).append(place)
    return rows.select(kept), rows.select(apart)


def shares_of(sizes: Mapping[Hashable, int], count: int) -> dict[Hashable, int]:
    """How many of `count` rows each class gives: in proportion to its size, whole rows by largest remainder.

    A class keeps one row, unless every other class gave all but its last row.
    """
    total = sum(sizes.values())
    exact = {name: count * size / total for name, size in sizes.items()}
    given = {name: min(int(exact[name]), size - 1) for name, size in sizes.items()}
    names = sorted(sizes, key=lambda name: given[name] - exact[name])  # the largest remainder first
    for spared in (1, 0):
        while (missing := count - sum(given.values())) > 0:
            able = [name for name in names if given[name] < sizes[name] - spared]
            if not able:
                break
            given |= {name: given[name] + 1 for name in able[:missing]}
    return given


def with_test(splits: Splits, classes: str | None = None) -> Splits:
    """The splits with a `test` among them: the validation split, or a fixed tenth of the training rows, where there is
    none.

    Args:
        classes: a column whose classes all lose a tenth of their rows.

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
    if classes is not None and not isinstance(rows.features[classes], ClassLabel | Value):
        classes = None  # several labels of a row, which are refused later
    values = None if classes is None else [same_class(value) for value in rows[classes]]
    train, test = set_apart(rows, max(1, int(len(rows) * TEST_SHARE)), TEST_SEED, values)
    line = f"the data have no test split: {len(test)} of {len(rows)} rows, the same in every run, are set apart to score on"
    if values is not None and classes is not None:
        found = Counter(same_class(value) for value in test[classes])
        line += f" ({_counted({value: found[value] for value in dict.fromkeys(values)})})"
    tell(line)
    return {"train": train, "test": test}


def same_class(value: Any) -> Any:
    """A class as a file has it, without what file formats add: blanks around a word, the point of a whole number."""
    if isinstance(value, str):
        return value.strip()
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _counted(numbers: Mapping[Any, int]) -> str:
    """`negative 45, positive 5`, and which classes have no row; only the first ones where there are many."""
    names = sorted(numbers, key=str)
    some = [name for name in names if numbers[name]]
    words = [f"{name} {numbers[name]}" for name in some[:CLASSES_SHOWN]]
    words += [f"{len(some) - CLASSES_SHOWN} more classes"] if len(some) > CLASSES_SHOWN else []
    none = [str(name) for name in names if not numbers[name]]
    if none:
        shown = ", ".join(none[:CLASSES_SHOWN]) + (", ..." if len(none) > CLASSES_SHOWN else "")
        words.append(f"no row of {shown}")
    return ", ".join(words)
