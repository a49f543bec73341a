"""Choosing what stays: from scores, under a budget, to a plan."""

import heapq
from collections.abc import Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from distill_llm.errors import InputError, one_of
from distill_llm.pruning.choice import NO_LIMITS, Choice, Limits
from distill_llm.pruning.criteria import UNITS, Importance
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.structure import Costs, layer_shapes, unit_costs

Unit = Literal["heads", "queries", "neurons", "layers", "attention", "ffn", "hidden"]
BLOCKS = ("layers", "attention", "ffn")


def plan_pruning(
    model: PreTrainedModel,
    scores: Importance,
    keep: float,
    *,
    cost: Literal["params", "flops", "memory"] | Costs = "params",
    units: Sequence[Unit] = ("heads", "neurons"),
    scope: Literal["global", "local"] = "global",
    round_to: int = 1,
    uniform: bool = False,
    sequence_length: int = 128,
    limits: Limits = NO_LIMITS,
) -> PruningPlan:
    """Choose what stays so that `keep` of the layers' cost remains, never more, and as near below as the units allow.

    With scope "global" units compete over all layers; where the criterion's scores are comparable between kinds of units
    (Fisher) all kinds compete by score per cost, at what a unit costs in what is left; else each kind keeps the same share.
    With scope "local" every layer keeps the same share of its heads and of its neurons. `uniform` gives every layer the same
    numbers, which many stock configs can say.

    Args:
        scores: from `score(...)`, for this very model.
        keep: share of the layers' cost, in (0, 1].
        cost: parameters; FLOPs at `sequence_length` tokens; memory, with the keys and values of that many tokens; or costs that
            were measured (`latency_costs`).
        units: what may be removed: heads (KV groups), queries (equally many of every group), neurons, whole layers, the whole
            attention or FFN of a layer, hidden (channels of the residual stream).
        round_to: neurons of a layer, and channels of the residual stream, stay in multiples of this.
        limits: what every remaining layer keeps at least.

    Raises:
        InputError: for a value out of range, or a `keep` that these units cannot reach.
    """
    if not 0 < keep <= 1:
        raise InputError("keep", keep, "a share above 0 and at most 1")
    if round_to < 1:
        raise InputError("round_to", round_to, "a whole number of at least 1")
    if scope not in ("global", "local"):
        raise InputError("scope", scope, one_of(("global", "local"), scope))
    wrong = [unit for unit in units if unit not in UNITS]
    if wrong or not units:
        raise InputError("units", list(units), "one or more of " + ", ".join(UNITS))
    scores.require(units)
    shapes = layer_shapes(model)
    scores.check(shapes)
    costs = cost if isinstance(cost, Costs) else unit_costs(model, cost, sequence_length)
    limits = Limits(limits.heads, -(-limits.neurons // round_to) * round_to)
    choice = Choice(scores, shapes, costs, keep * costs.of(shapes), frozenset(units), limits)
    if len(units) == 1 and units[0] in BLOCKS:
        _blocks(choice, units[0])
    elif set(BLOCKS) & set(units) and not scores.comparable:
        accepted = f"one of {', '.join(BLOCKS)} alone, or criterion fisher: {scores.criterion!r} scores do not compare over kinds"
        raise InputError("units", list(units), accepted)
    elif scope == "global" and not uniform and scores.comparable:
        _together(choice, round_to)
    else:
        _per_kind(choice, local=scope == "local" or uniform, uniform=uniform, round_to=round_to)
    if "neurons" in units:
        _round_neurons(choice, round_to, uniform)
    return choice.plan(model.config.model_type, keep)


def _blocks(choice: Choice, unit: str) -> None:
    """Remove whole blocks of one kind, the least score first."""
    for i in getattr(choice.scores, unit).argsort().tolist():
        if choice.cost() <= choice.budget * (1 + 1e-9):
            break
        choice.remove(unit, i, 0)
    choice.reachable(choice.cost())


def _together(choice: Choice, round_to: int) -> None:
    """Remove the least score per cost first until the budget holds. (What this removes too much, `_round_neurons` puts back.)

    Costs only fall while units go, so a candidate's place can only move back: it is looked at again when it comes up.
    """
    scores, heap = choice.scores, []
    for kind in choice.units:
        for i, j, value in _candidates(scores, kind, choice.shared):
            price = choice.price(kind, i)
            heap.append((value / price if price else float("inf"), UNITS.index(kind), i, j, value))
    heapq.heapify(heap)
    left, tolerance = choice.cost(), 1 + 1e-9
    channel = choice.price("hidden", 0)
    while heap and left > choice.budget:
        ratio, number, i, j, value = heapq.heappop(heap)
        kind = UNITS[number]
        price = channel if kind == "hidden" else choice.price(kind, i)
        if price <= 0 or (kind != "hidden" and not choice.alive[i]):
            continue
        if value / price > ratio * tolerance and heap and value / price > heap[0][0]:
            heapq.heappush(heap, (value / price, number, i, j, value))
            continue
        if "neurons" in choice.units and kind not in ("heads", "neurons") and left - price < 0.99 * choice.budget:
            continue  # neurons come nearer
        if choice.remove(kind, i, j):
            left -= price
            if "hidden" in choice.units:
                channel = choice.price("hidden", 0) if kind != "neurons" else channel - choice.costs.neuron_[0]
    if "hidden" in choice.units and choice.width % round_to and choice.width > round_to:
        ranked = scores.hidden.masked_fill(~choice.hidden, float("inf")).argsort().tolist()  # type: ignore[union-attr]
        for j in ranked[: choice.width % round_to]:
            choice.remove("hidden", 0, j)
    choice.reachable(choice.cost())


def _candidates(scores: Importance, kind: str, shared: Sequence[int]) -> list[tuple[int, int, float]]:
    """(layer, index, score) of every unit of a kind; of queries, one of every group at a time, the least of each first."""
    found = getattr(scores, kind)
    if kind in ("heads", "neurons"):
        return [(i, j, value) for i, row in enumerate(found) for j, value in enumerate(row.tolist())]
    if kind == "queries":
        steps = [(i, row.view(-1, shared[i]).sort(dim=1).values.sum(0)[:-1]) for i, row in enumerate(found) if len(row)]
        return [(i, j, value) for i, row in steps for j, value in enumerate(row.tolist())]
    return [(0 if kind == "hidden" else i, i, value) for i, value in enumerate(found.tolist())]


def _per_kind(choice: Choice, *, local: bool, uniform: bool, round_to: int) -> None:
    """Each kind keeps the same share: over all layers, or within each (`local`); neurons take up what heads leave over."""
    costs, shapes, units = choice.costs, choice.shapes, choice.units
    heads, neurons = sum(s.heads for s in shapes), sum(s.neurons for s in shapes)
    if "hidden" in units:
        _narrow(choice, round_to)
    total, per_neuron = choice.cost(), costs.neuron_at(choice.width)
    movable_neurons = neurons * per_neuron * ("neurons" in units)
    in_heads = sum(
        s.heads * (costs.group_at(choice.width) + k * costs.query_at(choice.width))
        for s, k in zip(shapes, choice.slots, strict=True)
    )
    movable = in_heads * ("heads" in units) + movable_neurons
    in_queries = in_heads - heads * costs.group_at(choice.width)
    if "queries" in units and "heads" not in units:
        movable += in_queries
    choice.reachable(total - movable)
    if not movable:
        return
    share = (choice.budget - (total - movable)) / movable
    if "queries" in units and "heads" not in units:
        nearest = round if movable_neurons else int  # neurons make up for what is too much
        choice.slots = [max(1, nearest(share * k + 1e-6)) for k in choice.shared]
    if "heads" in units:
        # A head is dear: the nearest number, if the neurons can make up the difference.
        _keep_top(choice, "heads", share, local, uniform, nearest=True)
        if choice.cost() - movable_neurons > choice.budget:
            _keep_top(choice, "heads", share, local, uniform)
    if movable_neurons:
        left = choice.budget - (choice.cost() - movable_neurons)
        _keep_top(choice, "neurons", left / movable_neurons, local, uniform)
    choice.reachable(choice.cost())


def _narrow(choice: Choice, round_to: int) -> None:
    """Leave the share s of the channels with which s of the channels and s of everything else keep the budget."""
    movable = {"heads", "neurons"} & choice.units

    def cost(share: float) -> float:
        shapes = [
            (
                s.heads * (share if "heads" in movable else 1),
                s.neurons * (share if "neurons" in movable else 1),
                None if s.queries is None else s.queries * (share if "heads" in movable else 1),
            )
            for s in choice.shapes
        ]
        return choice.costs.of(shapes, round(share * choice.costs.hidden))

    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= choice.budget else (low, middle)
    width = int(low * choice.costs.hidden + 1e-6)
    if movable:
        width = max(round_to, round(width / round_to) * round_to)
    else:
        width = max(round_to, width // round_to * round_to)
    for j in choice.scores.hidden.argsort().tolist()[: max(0, choice.width - width)]:  # type: ignore[union-attr]
        choice.remove("hidden", 0, j)


def _keep_top(choice: Choice, kind: str, share: float, local: bool, uniform: bool, nearest: bool = False) -> None:
    share = min(max(share, 0.0), 1.0)
    scores: Sequence[torch.Tensor] = getattr(choice.scores, kind)
    least = getattr(choice.limits, kind)
    if local:
        fewest = min(len(row) for row in scores)
        for i, values in enumerate(scores):
            count = share * (fewest if uniform else len(values))
            count = max(round(count) if nearest else int(count + 1e-6), least)
            kept = torch.zeros(len(values), dtype=torch.bool)
            kept[values.argsort(descending=True)[:count]] = True
            choice.keep(kind, i, kept)
        return
    # What a layer keeps at least comes first, whatever it is worth.
    first = [torch.zeros(len(row), dtype=torch.bool) for row in scores]
    for row, values in zip(first, scores, strict=True):
        row[values.argsort(descending=True)[:least]] = True
    flat, chosen = torch.cat(list(scores)), torch.cat(first)
    order = flat.masked_fill(chosen, float("inf")).argsort(descending=True)
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[order[: int(share * len(flat) + 1e-6)]] = True
    for i, part in enumerate(chosen.split([len(row) for row in scores])):
        choice.keep(kind, i, part)


def _round_neurons(choice: Choice, round_to: int, uniform: bool) -> None:
    """Bring every layer's neurons to a multiple of `round_to`, then spend what is left of the budget on whole blocks."""
    alive = [i for i, living in enumerate(choice.alive) if living]
    price, scores = choice.costs.neuron_at(choice.width), choice.scores.neurons
    least = choice.limits.neurons
    counts = {i: max(choice.neuron_count[i] // round_to * round_to, least) for i in alive}
    spare = choice.budget - (choice.cost() - price * sum(choice.neuron_count[i] - counts[i] for i in alive))
    ranked = {i: scores[i].argsort(descending=True) for i in alive}
    while spare < -1e-6 and (
        larger := [i for i in alive if counts[i] > least]
    ):  # the limits took what others must give
        poorest = min(larger, key=lambda i: scores[i][ranked[i][counts[i] - round_to : counts[i]]].sum().item())
        counts[poorest] -= round_to
        spare += price * round_to
    worth = {i: torch.cat([torch.zeros(1), scores[i][ranked[i]].cumsum(0)]) for i in alive}
    while True:
        group = alive if uniform else []
        if not uniform:
            best = -1.0
            for i in alive:
                end = counts[i] + round_to
                value = (worth[i][end] - worth[i][counts[i]]).item() if end <= choice.shapes[i].neurons else -1.0
                if value > best:
                    best, group = value, [i]
        needed = price * round_to * len(group)
        if not group or needed > spare or any(counts[i] + round_to > choice.shapes[i].neurons for i in group):
            break
        for i in group:
            counts[i] += round_to
        spare -= needed
    for i in alive:
        kept = torch.zeros(len(scores[i]), dtype=torch.bool)
        kept[ranked[i][: counts[i]]] = True
        choice.keep("neurons", i, kept)
