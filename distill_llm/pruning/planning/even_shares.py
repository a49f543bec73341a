"""Plans in which units do not compete: each kind, or each layer, keeps the same share."""

import math
from collections.abc import Callable, Sequence
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


def _up(count: float) -> float:
    return math.ceil(count - 1e-6)


def keep_shares(choice: Choice, accepts: Accepts | None) -> None:
    """Each kind keeps the same share: over all layers, or within each (`local`); fine kinds (neurons) take up what others leave.

    Other units are large, so they keep the nearest whole number for which the fine ones can make up the difference. Where there
    are numbers that the family's own config `accepts`, they keep the nearest of these.
    """
    if "layers" in choice.rules.units:
        _choose_layers(choice)
    counts = _kinds(choice)
    cost = _cost_of_shares(choice, counts)
    share, rounding = _stock_share(choice, accepts) or _nearest_share(choice, cost)
    fine = _largest(choice, lambda fine: cost(share, fine, rounding=rounding))
    for kind in [kind for kind in counts if kind in choice.rules.units]:
        found = counts[kind](fine, _down) if KINDS[kind].fine else counts[kind](share, rounding)
        for i, count in zip(choice.living(), found, strict=True):
            choice.keep(kind, i, int(count))


def _nearest_share(choice: Choice, cost: Callable[..., float]) -> tuple[float, Rounding]:
    """The share that all keep, and how it is rounded to whole heads; channels are chosen on the way."""
    if "hidden" in choice.rules.units:
        wanted = choice.width * _common_share(choice, cost)
        widths = [width for width in _widths(choice) if choice.fits(cost(0, 0, width))]
        near = [w for w in widths if cost(1, 1, w) >= NEAR * choice.budget] or widths[-1:]
        choice.narrow(min(near, key=lambda w: abs(w - wanted)))
    share = _largest(choice, lambda share: cost(share, share))
    rounding: Rounding
    for rounding in (round, _up, _down):
        if choice.fits(cost(share, 0, rounding=rounding)) and cost(share, 1, rounding=rounding) >= NEAR * choice.budget:
            break
    return share, rounding


def _stock_share(choice: Choice, accepts: Accepts | None) -> tuple[float, Rounding] | None:
    """As `_nearest_share` where all layers are alike, of the numbers of heads and channels that the family's own config accepts.

    None where it accepts none within a quarter of the share, or neurons cannot bring them to the budget. (Heads that must
    divide the width can be halved, so that some are near enough.)
    """
    counts = _kinds(choice)
    heads, queries = counts["heads"], counts["queries"]
    if accepts is None or len(alike := set(zip(heads(1, _exact), queries(1, _exact), strict=True))) > 1:
        return None
    cost, (most, shared) = _cost_of_shares(choice, counts), alike.pop()
    steps = int(most if "heads" in choice.rules.units else shared if "queries" in choice.rules.units else 1)
    widths = _widths(choice)
    wanted = _common_share(choice, cost)
    # Of as many widths in a row as there are queries, one divides by their number.
    widths = sorted(widths, key=lambda width: abs(width / choice.width - wanted))[: int(most * shared)]
    shares = [step / steps for step in range(1, steps + 1)] if steps > 1 else [wanted]
    pairs = [(s, w) for s, w in product(shares, widths) if abs(s - wanted) <= 0.25 + 1e-9]
    for share, width in sorted(pairs, key=lambda pair: abs(pair[0] - wanted) + abs(pair[1] / choice.width - wanted)):
        least, full = (cost(share, fine, width, round) for fine in (0, 1))
        groups, each = int(heads(share, round)[0]), int(queries(share, round)[0])
        near = choice.fits(least) and full >= NEAR * choice.budget
        if near and accepts(groups * each, groups, width):
            choice.narrow(width)
            return share, round
    return None


def _widths(choice: Choice) -> list[int]:
    """Numbers of channels of the residual stream that may stay."""
    if "hidden" not in choice.rules.units:
        return [choice.width]
    step = choice.rules.round_to
    return list(range(min(step, choice.width), choice.width + 1, step))


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
