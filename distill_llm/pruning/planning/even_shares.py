"""Plans in which units do not compete: each kind, or each layer, keeps the same share."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from distill_llm.pruning.planning.budgets import fewest
from distill_llm.pruning.planning.candidate import NEAR, Choice
from distill_llm.pruning.units.kinds import KINDS

Rounding = Callable[[float], float]
Counts = Callable[[float, Rounding], list[float]]
"""How many units of a kind every layer that is left keeps of a share; of queries: of a group."""
Accepts = Callable[[int, int, int], bool]
"""Whether the family's own config can say so many query heads, groups and channels, in every layer."""


def _exact(count: float) -> float:
    return count


def _down(count: float) -> float:
    return math.floor(count + 1e-6)


def keep_shares(choice: Choice, accepts: Accepts | None) -> None:
    """Each kind keeps the same share: over all layers, or within each (`local`); fine kinds (neurons) take up what others leave.

    Units come whole, and neurons and channels in steps, so the shares are only nearly the same. Of the numbers of heads,
    neurons and channels that keep the budget, those count that come within 1% of it; where none does, those within 1% of the
    largest cost. Of these the most even ones are taken; if the family's own config `accepts` some, the most even of them.
    """
    if "layers" in choice.rules.units:
        _choose_layers(choice)
    counts = _kinds(choice)
    share, width = _nearest_numbers(choice, counts, accepts)
    choice.narrow(width)
    cost = _cost_of_shares(choice, counts)
    fine = _largest(choice, lambda fine: cost(share, fine, rounding=round))
    for kind in [kind for kind in counts if kind in choice.rules.units]:
        found = counts[kind](fine, _down) if KINDS[kind].fine else counts[kind](share, round)
        for i, count in zip(choice.living(), found, strict=True):
            choice.keep(kind, i, int(count))


@dataclass(frozen=True)
class _Numbers:
    """Numbers of units that keep the budget: the share of heads or queries, the width, as many neurons as fit beside them.

    Attributes:
        cost: of all that stays.
        uneven: how far the shares are from the common one, summed over the kinds.
    """

    share: float
    width: int
    cost: float
    uneven: float


def _nearest_numbers(choice: Choice, counts: dict[str, Counts], accepts: Accepts | None) -> tuple[float, int]:
    """The share of heads or queries, and the width, by the rule of `keep_shares`.

    The family's config has a say where all layers are alike, within a quarter of the common share. (Heads that must divide
    the width can be halved, so that some are near enough.)
    """
    cost = _cost_of_shares(choice, counts)
    wanted = _common_share(choice, cost)
    found = [
        numbers
        for share, width in product(_shares(choice, counts, wanted), _widths(choice, counts, wanted))
        if (numbers := _filled_up(choice, counts, cost(share, 0, width, round), (share, width), wanted))
    ]
    if not found:
        choice.reachable(min(cost(0, 0, width, round) for width in _widths(choice, counts, wanted)))
    most = max(numbers.cost for numbers in found)
    floor = NEAR * (choice.budget if most >= NEAR * choice.budget else most)
    near = sorted((numbers for numbers in found if numbers.cost >= floor), key=lambda numbers: numbers.uneven)
    heads, queries = counts["heads"], counts["queries"]
    if accepts is not None and len(set(zip(heads(1, _exact), queries(1, _exact), strict=True))) == 1:
        for numbers in near:
            groups, each = int(heads(numbers.share, round)[0]), int(queries(numbers.share, round)[0])
            if abs(numbers.share - wanted) <= 0.25 + 1e-9 and accepts(groups * each, groups, numbers.width):
                return numbers.share, numbers.width
    return near[0].share, near[0].width


def _filled_up(
    choice: Choice, counts: dict[str, Counts], least: float, chosen: tuple[float, int], wanted: float
) -> _Numbers | None:
    """The chosen share and width with as many neurons as the budget has room for; None where it has no room for the rest.

    Args:
        least: the cost with as few neurons as may stay.
        chosen: share and width.
        wanted: the share that all would keep if units were not whole.
    """
    if not choice.fits(least):
        return None
    (share, width), units = chosen, choice.rules.units
    uneven = abs(share - wanted) if _coarse(counts, units) else 0.0
    uneven += abs(width / choice.costs.hidden - wanted) if "hidden" in units else 0.0
    if "neurons" not in units:
        return _Numbers(share, width, least, uneven)
    fewest_, most = counts["neurons"](0, _exact), counts["neurons"](1, _exact)
    room = [int(m - f + 1e-6) // choice.rules.round_to for f, m in zip(fewest_, most, strict=True)]
    together = sum(m > 0 for m in most) if choice.rules.uniform else 1
    price = choice.costs.at("neurons", width) * choice.rules.round_to
    spare = choice.budget * (1 + 1e-9) - least
    blocks = int(spare / (price * max(together, 1))) * together if price else sum(room)  # measured times may be 0
    blocks = min(blocks, sum(room))
    kept = (sum(fewest_) + blocks * choice.rules.round_to) / max(sum(most), 1)
    return _Numbers(share, width, least + blocks * price, uneven + abs(kept - wanted))


def _coarse(counts: dict[str, Counts], units: Sequence[str]) -> list[str]:
    """The kinds inside layers that may go and are not fine: heads or queries."""
    return [kind for kind in counts if kind in units and not KINDS[kind].fine]


def _shares(choice: Choice, counts: dict[str, Counts], wanted: float) -> list[float]:
    """The shares of heads or queries that whole numbers of them are; over all layers, of many the nearest to the common one."""
    found: set[float] = set()
    for kind in _coarse(counts, choice.rules.units):
        most = counts[kind](1, _exact)
        sizes = set(most) if choice.rules.local or kind in choice.inner else {sum(most)}
        found |= {count / size for size in sizes if size for count in range(int(size) + 1)}
    nearest = sorted(found, key=lambda share: abs(share - wanted))
    return (nearest if choice.rules.local else nearest[:64]) or [wanted]


def _widths(choice: Choice, counts: dict[str, Counts], wanted: float) -> list[int]:
    """Numbers of channels of the residual stream that may stay, the nearest to the common share."""
    if "hidden" not in choice.rules.units:
        return [choice.width]
    step = choice.rules.round_to
    every = range(min(step, choice.width), choice.width + 1, step)
    # Of as many widths in a row as there are queries, one divides by their number.
    queries = max(h * q for h, q in zip(counts["heads"](1, _exact), counts["queries"](1, _exact), strict=True))
    return sorted(every, key=lambda width: abs(width / choice.costs.hidden - wanted))[: max(int(queries), 8)]


def _choose_layers(choice: Choice) -> None:
    """Remove as many layers, the least first, as bring the share of layers that stay nearest to that of all else that stays."""
    order, count = choice.scores.layers.argsort().tolist(), len(choice.shapes)
    if choice.rules.anchored:
        order.sort(key=lambda layer: layer == 0)  # goes last, which is never
    found: list[tuple[float, int]] = []
    for gone in range(count):
        choice.alive = [i not in order[:gone] for i in range(count)]
        if not choice.fits(choice.least_of(choice.living())):
            continue
        share = _common_share(choice, _cost_of_shares(choice, _kinds(choice)))
        found.append((abs(1 - gone / count - share), gone))
    if not found:  # not even of the best layer alone
        choice.reachable(choice.least_of(order[-1:]))
    gone = min(found)[1]
    choice.alive = [i not in order[:gone] for i in range(count)]


def _kinds(choice: Choice) -> dict[str, Counts]:
    """The counts of every kind of unit in layers."""
    return {kind: _counts(choice, kind) for kind in (*choice.kept, *choice.each)}


def _cost_of_shares(choice: Choice, counts: dict[str, Counts]) -> Callable[..., float]:
    """What is left costs with a share of fine kinds (neurons), and one of all others (coarse)."""
    living = choice.living()

    def cost(coarse: float, fine: float, width: int | None = None, rounding: Rounding = _exact) -> float:
        columns = {
            kind: count(fine, _exact) if KINDS[kind].fine else count(coarse, rounding) for kind, count in counts.items()
        }
        for kind, around in choice.inner.items():
            columns[kind] = [n * each for n, each in zip(columns[around], columns[kind], strict=True)]
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return choice.costs.of(rows, choice.width if width is None else width, living)

    return cost


def _common_share(choice: Choice, cost: Callable[..., float]) -> float:
    """The largest share that all kinds of units can keep alike, channels too where they may go."""
    narrowing = "hidden" in choice.rules.units
    return _largest(choice, lambda s: cost(s, s, round(s * choice.width) if narrowing else None))


def _largest(choice: Choice, cost: Callable[[float], float]) -> float:
    """The largest share whose cost, which grows with it, keeps the budget."""
    if choice.fits(cost(1.0)):
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if choice.fits(cost(middle)) else (low, middle)
    return low


def _counts(choice: Choice, kind: str) -> Counts:
    """How many units of a kind every layer that is left keeps, given the share that stays."""
    living = choice.living()
    shapes = [choice.shapes[i] for i in living]
    around = choice.inner.get(kind)
    if around:
        has, least = [choice.had[kind][i] for i in living], [1] * len(living)
    else:
        has, least = [shape[kind] for shape in shapes], [choice.least[i][kind] for i in living]
    if kind not in choice.rules.units:
        return lambda share, rounding: list(has)
    if choice.rules.local or around:
        there = fewest(count for count, shape in zip(has, shapes, strict=True) if not around or shape[around])
        most = [min(count, there) for count in has] if choice.rules.uniform else has
        return lambda share, rounding: [max(rounding(share * m), at) for m, at in zip(most, least, strict=True)]
    # What a layer keeps at least comes first, whatever it is worth.
    rows: Sequence[torch.Tensor] = [getattr(choice.scores, kind)[i] for i in living]
    beyond = [row.sort(descending=True).values[at:] for row, at in zip(rows, least, strict=True)]
    layer = torch.repeat_interleave(torch.tensor([len(row) for row in beyond]))
    order = layer[torch.cat(beyond).argsort(descending=True)]

    def counts(share: float, rounding: Rounding) -> list[float]:
        more = max(int(rounding(share * sum(has)) + 1e-6) - sum(least), 0)
        found = order[:more].bincount(minlength=len(least)).tolist()
        return [at + count for at, count in zip(least, found, strict=True)]

    return counts
