"""Relation heads: into how many parts the vectors of a token are divided."""

import math
from collections.abc import Set as AbstractSet

from distill_llm.common.errors import InputError

MOST_HEADS = 12  # where no number is given; that of a BERT base


def relation_heads(given: int | None, widths: AbstractSet[int], field: str = "losses.relations.heads") -> int:
    """The number of relation heads that layers of these widths are divided into: as given, else the most up to MOST_HEADS.

    Raises:
        InputError: the given number does not divide all widths; names the numbers that do.
    """
    common = math.gcd(*widths)
    if given is None:
        return max(number for number in range(1, MOST_HEADS + 1) if common % number == 0)
    if common % given:
        divisors = [str(number) for number in range(1, common + 1) if common % number == 0]
        accepted = f"a divisor of the widths {', '.join(map(str, sorted(widths)))}: {', '.join(divisors)}"
        raise InputError(field, given, accepted)
    return given
