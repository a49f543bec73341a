"""Plans for known costs: units compete, or keep the same share, until the budget holds."""

import heapq
import math
from dataclasses import replace
from functools import partial

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of
from distill_llm.common.errors import InputError, one_of, raise_all
from distill_llm.pruning.cutting.stock import stock_accepts
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.names import competing_faults
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning.candidate import NEAR, Choice
from distill_llm.pruning.planning.even_shares import keep_shares
from distill_llm.pruning.planning.rules import DEFAULT_RULES, PlanningRules
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.kind import Candidate, UnitKind
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.pruning.units.refusals import step_faults, width_faults
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
    if not units or set(units) - KINDS.keys():
        raise InputError("units", list(units), "one or more of " + ", ".join(KINDS))
    for fault in competing_faults(units, scores.criterion, rules.scope, rules.uniform, scores.layer_criterion):
        raise fault
    counts, channels = counts_of(model), hidden_size(model)
    raise_all(
        [*step_faults(counts, channels, units, rules.round_to), *width_faults(model, units, "units", list(units))]
    )
    scores.require([KINDS[unit].scored for unit in units])
    scores.check(counts, channels)


def choice_for(model: PreTrainedModel, scores: Importance, keep: float, costs: Costs, rules: PlanningRules) -> Choice:
    """What a plan is chosen from: all of the model.

    Raises:
        InputError: as of `check_settings`, or the budget is below the least that the rules can leave.
    """
    check_settings(model, scores, keep, rules)
    shapes = counts_of(model)
    rules = replace(rules, anchored=family_of(model).anchored)
    choice = Choice(scores, shapes, costs, keep * costs.of(shapes), rules)
    choice.reachable(choice.least_cost())
    return choice


def plan_for_costs(
    model: PreTrainedModel, scores: Importance, keep: float, costs: Costs, rules: PlanningRules = DEFAULT_RULES
) -> PruningPlan:
    """`plan_pruning` where what units cost is known."""
    choice, family = choice_for(model, scores, keep, costs, rules), family_of(model)
    rules, units = choice.rules, rules.units
    moved = {"heads", "queries", "hidden"}.intersection(units)
    stock = rules.uniform and moved and moved <= set(family.stock)
    accepts = partial(stock_accepts, model.config) if stock else None
    if "hidden" in units and choice.width > rules.round_to:
        choice.narrow(choice.width // rules.round_to * rules.round_to)
    alone = len(units) == 1 and KINDS[units[0]].block
    if alone or (not rules.local and scores.comparable(units)):
        competition = _Competition(choice)
        competition.run()
        gone = [(i, j) for kind, i, j in competition.gone if kind.name == "heads"]
    else:
        keep_shares(choice, accepts)
        gone = _heads_gone(choice)
    if "neurons" in units:
        _round_neurons(choice)
        if not rules.local:
            _put_heads_back(choice, gone)
    choice.reachable(choice.cost())
    return choice.plan(model.config.model_type, keep)


class _Competition:
    """The least score per cost goes first until the budget holds.

    Costs only fall while units go, so a candidate's place can only move back: it is looked at again when it comes up. A unit
    so large that the budget would be missed by more than 1% has to wait until nothing else can go. Heads and layers come back
    where there is room again after it went. Where heads take too much, `_round_neurons` puts neurons back.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice, self.kinds = choice, list(KINDS.values())
        self.waiting: list[tuple[UnitKind, int, int, float]] = []
        self.gone: list[tuple[UnitKind, int, int]] = []  # what may come back
        self.following: dict[str, list[Candidate]] = {}  # of kinds that go in order
        self.heap: list[tuple[float, int, int, int, float]] = []
        for unit in choice.rules.units:
            kind, found = KINDS[unit], KINDS[unit].candidates(choice)
            if kind.in_order:
                self.following[unit], found = found, found[:1]
            for i, j, value in found:
                price = kind.price(choice, i)
                self.heap.append((self._rank(value, price), self.kinds.index(kind), i, j, value))
        heapq.heapify(self.heap)
        self.left, self.channels = choice.cost(), KINDS["hidden"].price(choice, 0)

    def run(self) -> None:
        """Remove units until the budget holds, or none is left."""
        while self.heap and not self.choice.fits(self.left):
            self._step()
        if self.choice.fits(self.left):
            return
        while self.waiting and not self.choice.fits(self.choice.cost()) and self._take_a_waiting_one():
            pass
        for kind, i, j in reversed(self.gone):
            there = kind.name == "layers" or self.choice.alive[i]
            if there and self.choice.fits(self.choice.cost() + kind.price(self.choice, i)):
                self.choice.put_back(kind.name, i, j)

    def _rank(self, value: float, price: float) -> float:
        """What decides who goes next: score per cost, or the score itself where the criterion says so."""
        if not price:
            return math.inf
        return value / price if self.choice.scores.by_cost else value

    def _price(self, kind: UnitKind, i: int) -> float:
        return kind.price(self.choice, i) if kind.in_layer else self.channels

    def _step(self) -> None:
        """Look at the first candidate: it goes, waits, or has its place behind others now."""
        ratio, number, i, j, value = heapq.heappop(self.heap)
        choice, kind = self.choice, self.kinds[number]
        price = self._price(kind, i)
        if price <= 0 or (kind.in_layer and not choice.alive[i]):
            return
        now = self._rank(value, price)
        if now > ratio + 1e-9 * abs(ratio) and self.heap and now > self.heap[0][0]:
            heapq.heappush(self.heap, (now, number, i, j, value))
        elif not kind.fine and self.left - price + _made_up(choice, kind) < NEAR * choice.budget:
            self.waiting.append((kind, i, j, value))
        elif following := self._take(kind, i, j):
            heapq.heappush(self.heap, (self._rank(following[2], self.channels), number, *following))

    def _take(self, kind: UnitKind, i: int, j: int) -> Candidate | None:
        """Remove a unit; the one that follows it, of a kind that goes in order."""
        before = self._price(kind, i)
        if (kind.in_layer and not self.choice.alive[i]) or not kind.remove(self.choice, i, j):
            return None
        self.left -= before
        if kind.returns:
            self.gone.append((kind, i, j))
        elif kind.block:
            self.gone = [unit for unit in self.gone if not (unit[0].cuts == kind.cuts and unit[1] == i)]
        if "hidden" in self.choice.rules.units:
            one = self.choice.rules.round_to * self.choice.costs.units["neurons"][0]
            self.channels = self.channels - one if kind.fine else KINDS["hidden"].price(self.choice, 0)
        following = self.following.get(kind.name, [])
        return following[j + 1] if j + 1 < len(following) else None

    def _take_a_waiting_one(self) -> bool:
        """Of those that cost about the least, remove the least score; False where none costs anything."""
        alive = self.choice.alive
        prices = [kind.price(self.choice, i) if not kind.in_layer or alive[i] else 0.0 for kind, i, *_ in self.waiting]
        most = 1.1 * min((price for price in prices if price), default=0.0)
        there = [k for k, price in enumerate(prices) if 0 < price <= most]
        if not there:
            return False
        kind, i, j, _ = self.waiting.pop(min(there, key=lambda k: self.waiting[k][3]))
        if following := self._take(kind, i, j):
            self.waiting.append((kind, *following))
        return True


def _made_up(choice: Choice, kind: UnitKind) -> float:
    """How much of what a unit takes too much could be made up for with neurons that are gone: for heads only."""
    if kind.name != "heads" or "neurons" not in choice.rules.units:
        return 0.0
    counts = choice.count["neurons"]
    gone = sum(s["neurons"] - n for s, n, on in zip(choice.shapes, counts, choice.alive, strict=True) if on)
    return gone * choice.costs.at("neurons", choice.width)


def _heads_gone(choice: Choice) -> list[tuple[int, int]]:
    """The heads that went, as (layer, head); the least score first."""
    gone = [(i, j) for i in choice.living() for j, stays in enumerate(choice.kept["heads"][i].tolist()) if not stays]
    return sorted(gone, key=lambda head: float(choice.scores.heads[head[0]][head[1]]))


def _put_heads_back(choice: Choice, gone: list[tuple[int, int]]) -> None:
    """Put heads back that fit into the room that whole blocks of neurons leave, the last of `gone` first."""
    left = choice.cost()
    for i, j in reversed(gone):
        if choice.alive[i] and not choice.kept["heads"][i][j] and choice.fits(left + choice.price("heads", i)):
            choice.put_back("heads", i, j)
            left = choice.cost()


def _round_neurons(choice: Choice) -> None:
    """Bring every layer's neurons down to a multiple of `round_to`, then add whole blocks while the budget allows it.

    Where every layer keeps the same share, a layer gets at most one block more.
    """
    alive, step = [i for i, living in enumerate(choice.alive) if living], choice.rules.round_to
    price, scores = choice.costs.at("neurons", choice.width), choice.scores.neurons
    counts = {i: max(choice.count["neurons"][i] // step * step, choice.least[i]["neurons"]) for i in alive}
    spare = choice.budget - (choice.cost() - price * sum(choice.count["neurons"][i] - counts[i] for i in alive))
    most = {i: counts[i] + step if choice.rules.local else choice.shapes[i]["neurons"] for i in alive}
    most = {i: min(most[i], choice.shapes[i]["neurons"]) for i in alive}
    worth = {i: torch.cat([torch.zeros(1), scores[i].sort(descending=True).values.cumsum(0)]) for i in alive}
    while True:
        group = [i for i in alive if choice.shapes[i]["neurons"]] if choice.rules.uniform else []
        if not choice.rules.uniform:
            best = -math.inf
            for i in alive:
                end = counts[i] + step
                value = (worth[i][end] - worth[i][counts[i]]).item() if end <= most[i] else -math.inf
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
