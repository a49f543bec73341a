"""What the fast tests leave out of grids."""

from itertools import combinations, product

import pytest
from builders.grids import covering


@pytest.mark.parametrize("sizes", [(3, 8), (5, 3, 2, 3), (2, 2, 2), (4,)], ids=str)
@pytest.mark.parametrize("strength", [1, 2])
def test_every_value_or_pair_is_in_a_row_and_few_rows_are_needed(sizes: tuple[int, ...], strength: int) -> None:
    rows = list(product(*map(range, sizes)))
    chosen = [rows[i] for i in covering(rows, strength)]
    strength = min(strength, len(sizes))
    for places in combinations(range(len(sizes)), strength):
        seen = {tuple(row[place] for place in places) for row in chosen}
        assert seen == set(product(*(range(sizes[place]) for place in places)))
    least = max(
        len(set(product(*(range(sizes[p]) for p in places)))) for places in combinations(range(len(sizes)), strength)
    )
    assert least <= len(chosen) <= 1.5 * least + 1
    assert len(chosen) == len(set(chosen))
