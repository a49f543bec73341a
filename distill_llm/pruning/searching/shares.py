"""How many heads and neurons each layer keeps, or that it goes, under a budget: what evolution changes."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil
from random import Random

from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of
from distill_llm.common.errors import InputError, raise_all
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning.candidate import Choice
from distill_llm.pruning.planning.rules import SEARCHED, PlanningRules, search_faults
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.sizes import counts_of

Genome = tuple[tuple[int, int] | None, ...]
"""Of every layer the heads (KV groups) and the neurons that stay; None: the layer goes."""
STEP = 16
"""Neurons move by up to a quarter of a layer's, in parts of this many."""


class Space:
    """The plans that evolution may try: for every layer two numbers, never above the budget.

    Within a layer the units with the highest scores stay.

    Args:
        model: what is cut.
        scores: of its units.
        costs: of its units, in the unit of `budget`.
        budget: the most that a plan may cost.
        rules: what may be removed, in which steps, and what every layer keeps.

    Raises:
        InputError: rules that a search does not keep.
    """

    def __init__(self, model: PreTrainedModel, scores: Importance, costs: Costs, budget: float, rules: PlanningRules):
        raise_all(search_faults(rules))
        self.model_type, self.scores, self.costs = model.config.model_type, scores, costs
        self.shapes, self.budget = counts_of(model), budget
        self.rules = replace(rules, anchored=family_of(model).anchored)
        self.least = Choice(scores, self.shapes, costs, budget, self.rules).least
        self.prices = [self._prices(i) for i in range(len(self.shapes))]
        self.step = rules.round_to

    def _prices(self, i: int) -> tuple[float, float, float]:
        """What layer `i` costs without units, and each of its heads (with its queries) and neurons."""
        shape = self.shapes[i]
        each = shape["queries"] // shape["heads"] if shape["heads"] else 0

        def cost(heads: int, neurons: int) -> float:
            return self.costs.of([{**shape, "heads": heads, "queries": heads * each, "neurons": neurons}], None, [i])

        empty = cost(0, 0)
        return empty, cost(1, 0) - empty, cost(0, 1) - empty

    def cost(self, genome: Genome) -> float:
        """The cost of all layers that stay."""
        rows = [(self.prices[i], row) for i, row in enumerate(genome) if row is not None]
        return sum(base + heads * a + neurons * b for (base, a, b), (heads, neurons) in rows)

    def fits(self, genome: Genome) -> bool:
        """Whether a genome is within the budget, and keeps a layer, and the first one if the family needs it."""
        living = [i for i, row in enumerate(genome) if row is not None]
        within = self.cost(genome) <= self.budget * (1 + 1e-9)
        return bool(living) and within and not (self.rules.anchored and living[0] != 0)

    def of_plan(self, plan: PruningPlan) -> Genome:
        """The numbers of a plan."""
        rows = {row.source: (len(row.heads), len(row.neurons)) for row in plan.layers}
        return tuple(rows.get(i) for i in range(len(self.shapes)))

    def plan(self, genome: Genome, keep: float) -> PruningPlan:
        """The plan with these numbers; `keep` is the share that was asked for, for its note."""
        choice = Choice(self.scores, self.shapes, self.costs, self.budget, self.rules)
        for i, row in enumerate(genome):
            if row is None:
                choice.alive[i] = False
                continue
            for kind, count in zip(("heads", "neurons"), row, strict=True):
                if count < self.shapes[i][kind]:
                    choice.keep(kind, i, count)
        return choice.plan(self.model_type, keep)

    def mutated(self, genome: Genome, random: Random, moves: int = 1) -> Genome:
        """Another genome near to this one, within the budget."""
        rows = list(genome)
        for _ in range(moves):
            kind = random.choice([kind for kind in SEARCHED if kind in self.rules.units])
            if kind == "layers":
                self._swap_layer(rows, random)
                continue
            living = [i for i, row in enumerate(rows) if row is not None]
            losing, winning = random.choice(living), random.choice(living)
            size = random.choice((1, 1, 2)) if kind == "heads" else self._neurons(losing, random.randint(1, STEP // 4))
            self._change(rows, losing, kind, -size)
            self._change(rows, winning, kind, size)
        return self.repaired(tuple(rows), random)

    def _swap_layer(self, rows: list[tuple[int, int] | None], random: Random) -> None:
        """A layer goes, one that was gone comes back whole, or both."""
        living = [i for i, row in enumerate(rows) if row is not None and not (self.rules.anchored and i == 0)]
        gone, way = [i for i, row in enumerate(rows) if row is None], random.choice(("both", "go", "come"))
        if gone and way != "go":
            i = random.choice(gone)
            rows[i] = (self.shapes[i]["heads"], self.shapes[i]["neurons"])
        if len(living) > 1 and way != "come":
            rows[random.choice(living)] = None

    def crossed(self, one: Genome, other: Genome, random: Random) -> Genome:
        """Of every layer the numbers of either of two genomes, within the budget."""
        rows = tuple(random.choice(pair) for pair in zip(one, other, strict=True))
        return self.repaired(rows if any(row is not None for row in rows) else one, random)

    def repaired(self, genome: Genome, random: Random) -> Genome:
        """The genome within the budget and near to it: units go at random places, then come where there is room."""
        rows = list(genome)
        while (over := self.cost(tuple(rows)) - self.budget * (1 + 1e-9)) > 0:
            places = [place for place in self._places(rows, -1) if self._price(*place) > 0]
            if not places:
                self._drop_a_layer(rows, random)
                continue
            i, kind = random.choice(places)
            wanted = self.step * max(1, ceil(over / self._price(i, kind))) if kind == "neurons" else 1
            self._change(rows, i, kind, -min(wanted, self._neurons(i, 1)) if kind == "neurons" else -1)
        while True:
            room = self.budget * (1 + 1e-9) - self.cost(tuple(rows))
            growing = list(self._places(rows, 1))
            places = [(i, kind) for i, kind in growing if self._price(i, kind) <= room]
            if not growing and self._comes_back(rows, room, random):
                continue
            if not places:
                return tuple(rows)
            i, kind = random.choice(places)
            price, most = self._price(i, kind), self._neurons(i, 1)
            fitting = int(room // price) * self.step if price else most  # by measured times a unit may cost nothing
            self._change(rows, i, kind, min(fitting, most) if kind == "neurons" else 1)

    def _comes_back(self, rows: list[tuple[int, int] | None], room: float, random: Random) -> bool:
        """Let a layer come back with its least units, where the others are whole and there is still room for one."""
        least = [(each["heads"], each["neurons"]) for each in self.least]
        fitting = [i for i, row in enumerate(rows) if row is None and self.cost((*[None] * i, least[i])) <= room]
        if fitting:
            i = random.choice(fitting)
            rows[i] = least[i]
        return bool(fitting)

    def _drop_a_layer(self, rows: list[tuple[int, int] | None], random: Random) -> None:
        """Where nothing else can go, a layer does, such that one stays which fits; where none does, one that fits is all."""
        last = self._last_layers() if "layers" in self.rules.units else []
        if not last:
            fix = f"allow more: a plan of the fewest units costs more than {self.budget:.6g}"
            raise InputError("budget", self.budget, fix=fix)
        fitting = [i for i in last if rows[i] is not None]
        going = [i for i, row in enumerate(rows) if row is not None and fitting and fitting != [i]]
        if going:
            rows[random.choice(going)] = None
        else:
            only = random.choice(last)
            rows[:] = [(row["heads"], row["neurons"]) if i == only else None for i, row in enumerate(self.least)]

    def _last_layers(self) -> list[int]:
        """Layers of which each fits alone, with its fewest units."""
        least = [(row["heads"], row["neurons"]) for row in self.least]
        return [i for i in self.rules.last_layers(len(least)) if self.fits((*[None] * i, least[i]))]

    def _price(self, i: int, kind: str) -> float:
        """What the smallest number that may come to a layer costs."""
        return self.prices[i][1] if kind == "heads" else self.prices[i][2] * self.step

    def _neurons(self, i: int, parts: int) -> int:
        """So many parts of a layer's neurons, a multiple of the step."""
        return max(1, self.shapes[i]["neurons"] * parts // STEP // self.step) * self.step

    def _places(self, rows: Sequence[tuple[int, int] | None], way: int) -> Iterator[tuple[int, str]]:
        """Where a unit can go (-1) or come (1)."""
        for i, row in enumerate(rows):
            for kind, count in zip(("heads", "neurons"), row or (), strict=False):
                limit = self.least[i][kind] if way < 0 else self.shapes[i][kind]
                step = 1 if kind == "heads" else self.step
                if kind in self.rules.units and (count - step >= limit if way < 0 else count + step <= limit):
                    yield i, kind

    def _change(self, rows: list[tuple[int, int] | None], i: int, kind: str, by: int) -> None:
        """Let units of a layer go or come, as far as it may."""
        row = rows[i]
        assert row is not None
        at = ("heads", "neurons").index(kind)
        step = 1 if kind == "heads" else self.step
        low, high = self.least[i][kind], self.shapes[i][kind]
        count = row[at] + by
        while count < low:
            count += step
        while count > high:
            count -= step
        rows[i] = (count, row[1]) if at == 0 else (row[0], count)
