"""Plans for known costs: units compete, or keep the same share, until the budget holds."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of
from distill_llm.common.errors import InputError, one_of
from distill_llm.pruning.cutting.stock import stock_accepts
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.names import BLOCKS, UNITS, competing_faults
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning.candidate import NEAR, Choice
from distill_llm.pruning.planning.even_shares import keep_shares
from distill_llm.pruning.planning.rules import DEFAULT_RULES, PlanningRules
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.sizes import counts_of, hidden_size


def check_settings(model: PreTrainedModel, scores: Importance, keep: float, rules: PlanningRules) -> None:
    """Raise InputError for a value out of range, or units that these rules cannot remove together."""
    units = rules.units
    if not 0 < keep <= 1:
        raise InputError("keep", keep, "a share above 0 and at most 1")
    if rules.round_to < 1:
        raise InputError("round_to", rules.round_to, "a whole number of at least 1")
    if rules.scope not in ("global", "local"):
        raise InputError("scope", rules.scope, one_of(("global", "local"), rules.scope))
    wrong = [unit for unit in units if unit not in UNITS]
    if wrong or not units:
        raise InputError("units", list(units), "one or more of " + ", ".join(UNITS))
    for fault in competing_faults(units, scores.criterion, rules.scope, rules.uniform, scores.layer_criterion):
        raise fault
    scores.require(units)
    scores.check(counts_of(model), hidden_size(model))


def plan_for_costs(
    model: PreTrainedModel, scores: Importance, keep: float, costs: Costs, rules: PlanningRules = DEFAULT_RULES
) -> PruningPlan:
    """`plan_pruning` where what units cost is known."""
    check_settings(model, scores, keep, rules)
    shapes, units, family = counts_of(model), rules.units, family_of(model)
    if family.anchored and "hidden" in units:
        raise InputError(
            "units", list(units), "units without hidden for a model with a convolution after its first layer"
        )
    rules = replace(rules, anchored=family.anchored)
    choice = Choice(scores, shapes, costs, keep * costs.of(shapes), rules)
    choice.reachable(choice.least_cost())
    moved = {"heads", "queries", "hidden"}.intersection(units)
    stock = rules.uniform and moved and moved <= set(family.stock)
    accepts = partial(stock_accepts, model.config) if stock else None
    if "hidden" in units and choice.width > rules.round_to:
        choice.narrow(choice.width // rules.round_to * rules.round_to)
    alone = len(units) == 1 and units[0] in BLOCKS
    if alone or (not rules.local and scores.comparable(units)):
        _together(choice)
    else:
        keep_shares(choice, accepts)
    if "neurons" in units:
        _round_neurons(choice)
    choice.reachable(choice.cost())
    return choice.plan(model.config.model_type, keep)


def _together(choice: Choice) -> None:
    """Remove the least score per cost first until the budget holds.

    Costs only fall while units go, so a candidate's place can only move back: it is looked at again when it comes up. A unit
    so large that the budget would be missed by more than 1% has to wait until nothing else can go; heads and layers that have
    room again once it went come back. What heads take too much, `_round_neurons` puts back.
    """
    heap, steps, waiting = [], _channel_steps(choice), []
    gone: list[tuple[str, int, int]] = []  # what may come back: heads and layers
    for unit in choice.rules.units:
        for i, j, value in _candidates(choice, unit, steps):
            price = choice.price(unit, i)
            heap.append((value / price if price else math.inf, UNITS.index(unit), i, j, value))
    heapq.heapify(heap)
    left, channels = choice.cost(), choice.price("hidden", 0)

    def take(kind: str, i: int, j: int) -> tuple[int, int, float] | None:
        """Remove a unit; of channels, return the next step of them."""
        nonlocal left, channels
        before = channels if kind == "hidden" else choice.price(kind, i)
        if not choice.remove(kind, i, j):
            return None
        left -= before
        if kind in ("heads", "layers"):
            gone.append((kind, i, j))
        elif kind == "attention":
            gone[:] = [unit for unit in gone if unit[:2] != ("heads", i)]
        if "hidden" in choice.rules.units:
            one = choice.rules.round_to * choice.costs.neuron_[0]
            channels = channels - one if kind == "neurons" else choice.price("hidden", 0)
        return (0, j + 1, steps[j + 1]) if kind == "hidden" and j + 1 < len(steps) else None

    while heap and not choice.fits(left):
        ratio, number, i, j, value = heapq.heappop(heap)
        kind: str = UNITS[number]
        price = channels if kind == "hidden" else choice.price(kind, i)
        if price <= 0 or (kind != "hidden" and not choice.alive[i]):
            continue
        if value / price > ratio * (1 + 1e-9) and heap and value / price > heap[0][0]:
            heapq.heappush(heap, (value / price, number, i, j, value))
        elif kind != "neurons" and left - price + _made_up(choice, kind) < NEAR * choice.budget:
            waiting.append((kind, i, j, value))
        elif following := take(kind, i, j):
            heapq.heappush(heap, (following[2] / channels, number, *following))
    if choice.fits(left):
        return
    while waiting and not choice.fits(choice.cost()):
        # Of those that cost about the least, the least score.
        prices = [choice.price(kind, i) if kind == "hidden" or choice.alive[i] else 0.0 for kind, i, *_ in waiting]
        most = 1.1 * min((price for price in prices if price), default=0.0)
        there = [k for k, price in enumerate(prices) if 0 < price <= most]
        if not there:
            break
        kind, i, j, _ = waiting.pop(min(there, key=lambda k: waiting[k][3]))
        if following := take(kind, i, j):
            waiting.append((kind, *following))
    for kind, i, j in reversed(gone):
        if (kind == "layers" or choice.alive[i]) and choice.fits(choice.cost() + choice.price(kind, i)):
            choice.put_back(kind, i, j)


def _made_up(choice: Choice, kind: str) -> float:
    """How much of what a unit takes too much could be made up for with neurons that are gone: for heads only."""
    if kind != "heads" or "neurons" not in choice.rules.units:
        return 0.0
    gone = sum(
        s["neurons"] - n for s, n, on in zip(choice.shapes, choice.neuron_count, choice.alive, strict=True) if on
    )
    return gone * choice.costs.neuron_at(choice.width)


def _channel_steps(choice: Choice) -> list[float]:
    """Scores of the steps of `round_to` channels that may go, the least first."""
    if "hidden" not in choice.rules.units:
        return []
    assert choice.scores.hidden is not None
    ranked = choice.scores.hidden.sort().values[-choice.width :]
    return [step.sum().item() for step in ranked.split(choice.rules.round_to)[:-1]]


def _candidates(choice: Choice, kind: str, steps: Sequence[float]) -> list[tuple[int, int, float]]:
    """(layer, index, score) of every unit of a kind; of queries, one of every group at a time, the least of each first; of
    channels, the first step only."""
    found = getattr(choice.scores, kind)
    if kind == "hidden":
        return [(0, 0, value) for value in steps[:1]]
    if kind in ("heads", "neurons"):
        return [(i, j, value) for i, row in enumerate(found) for j, value in enumerate(row.tolist())]
    if kind == "queries":
        rows = [
            (i, row.view(-1, choice.shared[i]).sort(dim=1).values.sum(0)[:-1])
            for i, row in enumerate(found)
            if len(row)
        ]
        return [(i, j, value) for i, row in rows for j, value in enumerate(row.tolist())]
    return [(i, i, value) for i, value in enumerate(found.tolist())]


def _round_neurons(choice: Choice) -> None:
    """Bring every layer's neurons to a multiple of `round_to`, then spend what is left of the budget on whole blocks."""
    alive, step = [i for i, living in enumerate(choice.alive) if living], choice.rules.round_to
    price, scores = choice.costs.neuron_at(choice.width), choice.scores.neurons
    counts = {i: max(choice.neuron_count[i] // step * step, choice.least[i]["neurons"]) for i in alive}
    spare = choice.budget - (choice.cost() - price * sum(choice.neuron_count[i] - counts[i] for i in alive))
    worth = {i: torch.cat([torch.zeros(1), scores[i].sort(descending=True).values.cumsum(0)]) for i in alive}
    while True:
        group = [i for i in alive if choice.shapes[i]["neurons"]] if choice.rules.uniform else []
        if not choice.rules.uniform:
            best = -1.0
            for i in alive:
                end = counts[i] + step
                value = (worth[i][end] - worth[i][counts[i]]).item() if end <= choice.shapes[i]["neurons"] else -1.0
                if value > best:
                    best, group = value, [i]
        needed = price * step * len(group)
        if not group or needed > spare or any(counts[i] + step > choice.shapes[i]["neurons"] for i in group):
            break
        for i in group:
            counts[i] += step
        spare -= needed
    for i in alive:
        choice.keep("neurons", i, counts[i])
