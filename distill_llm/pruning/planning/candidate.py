"""What stays of a model and what it costs, while a plan is being made."""

from collections.abc import Sequence

import torch

from distill_llm.architectures.lineage import LAYER_UNITS, Counts
from distill_llm.common.errors import InputError
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.planning.budgets import inner_kinds, least_counts
from distill_llm.pruning.planning.rules import PlanningRules
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.kinds import KINDS

NEAR = 0.99
"""The part of a budget that a plan should use at least."""


class Choice:
    """What stays, while it is being chosen: the layers, the units of every kind in each, the channels.

    Attributes:
        kept, count: by kind and layer, which units stay, and how many.
        inner: the kinds that are within units of another kind (queries within heads), and within which.
        had, each: by these kinds and layer, how many every unit around them had, and keeps.
        width: how many channels of the residual stream stay.
    """

    def __init__(
        self, scores: Importance, shapes: Sequence[Counts], costs: Costs, budget: float, rules: PlanningRules
    ) -> None:
        self.scores, self.shapes, self.costs, self.budget, self.rules = scores, shapes, costs, budget, rules
        self.alive = [True] * len(shapes)
        self.inner = inner_kinds()
        outer = [kind for kind in LAYER_UNITS if kind not in self.inner]
        self.kept = {kind: [torch.ones(s[kind], dtype=torch.bool) for s in shapes] for kind in outer}
        self.had = {k: [s[k] // s[around] if s[around] else 1 for s in shapes] for k, around in self.inner.items()}
        self.each = {kind: list(row) for kind, row in self.had.items()}
        self.count = {kind: [s[kind] for s in shapes] for kind in self.kept}  # the same as numbers, to be quick
        self.width = costs.hidden
        self.least = least_counts(rules, shapes)
        least_width = rules.least_width(costs.hidden)
        self._least_costs = [costs.of([row], least_width, [i]) for i, row in enumerate(self.least)]

    def shape(self, i: int) -> Counts:
        """How many units of every kind layer `i` keeps."""
        counts = {kind: row[i] for kind, row in self.count.items()}
        return counts | {kind: counts[around] * self.each[kind][i] for kind, around in self.inner.items()}

    def living(self) -> list[int]:
        """The layers that stay."""
        return [i for i, alive in enumerate(self.alive) if alive]

    def cost(self) -> float:
        """The cost of everything that stays."""
        return self.costs.of(map(self.shape, self.living()), self.width, self.living())

    def least_cost(self) -> float:
        """The cost when everything is removed that may be removed; one layer always stays."""
        if "layers" not in self.rules.units:
            return sum(self._least_costs)
        return min(self._least_costs[i] for i in self.rules.last_layers(len(self.shapes)))

    def least_of(self, layers: Sequence[int]) -> float:
        """The cost of these layers when everything is removed from them that may be removed."""
        return sum(self._least_costs[i] for i in layers)

    def fits(self, cost: float) -> bool:
        """Whether a cost is within the budget."""
        return cost <= self.budget * (1 + 1e-9)

    def price(self, kind: str, i: int) -> float:
        """What a unit of layer `i` costs with all that is left within it: a head with its queries."""
        within = sum(row[i] * self.price(k, i) for k, row in self.each.items() if self.inner[k] == kind)
        return self.costs.at(kind, self.width, i) + within

    def drop(self, kind: str, i: int, where: slice | torch.Tensor) -> bool:
        """Remove units of a layer; False where they are gone already or too few would be left.

        Args:
            where: a slice of the layer's units, a mask over them, or their indices, each once.
        """
        gone = int(self.kept[kind][i][where].sum())
        if not gone or self.count[kind][i] - gone < self.least[i][kind]:
            return False
        self.count[kind][i] -= gone
        self.kept[kind][i][where] = False  # what indices pick is a copy
        return True

    def may_lose_layer(self, i: int) -> bool:
        """Whether the budget can be met without a layer: by one of the others alone, cut down to the least."""
        others = [k for k in self.rules.last_layers(len(self.shapes)) if self.alive[k] and k != i]
        return any(self.fits(self._least_costs[k]) for k in others)

    def put_back(self, kind: str, i: int, j: int) -> None:
        """Undo the removal of a unit or a layer."""
        if kind == "layers":
            self.alive[i] = True
        else:
            self.kept[kind][i][j] = True
            self.count[kind][i] += 1

    def keep(self, kind: str, i: int, count: int) -> None:
        """Keep the best `count` units of a layer, or of every unit of the kind around them."""
        if kind in self.each:
            self.each[kind][i] = count
            return
        best = getattr(self.scores, kind)[i].argsort(descending=True)[:count]
        self.kept[kind][i][:] = False
        self.kept[kind][i][best] = True
        self.count[kind][i] = count

    def narrow(self, width: int) -> None:
        """Keep the best `width` channels of the residual stream."""
        self.width = width

    def reachable(self, left: float) -> None:
        """Raise InputError if the least cost, `left`, is above the budget."""
        if not self.fits(left):
            total, units = self.costs.of(self.shapes), " and ".join(u for u in KINDS if u in self.rules.units)
            accepted = f"at least {left / total:.4f} when only {units} can be removed"
            kept = [
                f"{least} {kind}"
                for kind, least in vars(self.rules.limits).items()
                if least and kind in self.rules.units
            ]
            accepted += f" and every layer keeps {' and '.join(kept)}" if kept else ""
            raise InputError("keep", round(self.budget / total, 4), accepted)

    def plan(self, model_type: str, keep: float) -> PruningPlan:
        rows = [LayerPlan(i, units=self._units(i)) for i in self.living()]
        share, note = self.cost() / self.costs.of(self.shapes), None
        if abs(share - keep) > 0.01 * keep:
            note = f"kept {share:.4f} of the layers' {self.costs.name} instead of {keep}: "
            sizes = [{shape[k] for shape in self.shapes} - {0} for k in self.kept]
            uneven = self.rules.uniform and max(map(len, sizes)) > 1
            note += "these units come in larger steps" + (
                ", and no layer keeps more than the smallest" if uneven else ""
            )
        return PruningPlan(model_type, tuple(rows), share, note, hidden=self._channels())

    def _channels(self) -> tuple[int, ...] | None:
        if self.width == self.costs.hidden:
            return None
        assert self.scores.hidden is not None
        return tuple(self.scores.hidden.argsort(descending=True)[: self.width].sort().values.tolist())

    def _units(self, i: int) -> dict[str, list[int] | None]:
        """The units that a layer keeps, by kind; None: all, of a kind that plans need not name."""
        units: dict[str, list[int] | None] = {}
        for kind, rows in self.kept.items():
            all_stay = not LAYER_UNITS[kind].named and bool(rows[i].all())
            units[kind] = None if all_stay else rows[i].nonzero().flatten().tolist()
        for kind, around in self.inner.items():
            kept = self.kept[around][i].nonzero().flatten().tolist()
            units[kind] = self._inside(kind, i, kept) if kept and self.each[kind][i] < self.had[kind][i] else None
        return units

    def _inside(self, kind: str, i: int, around: Sequence[int]) -> list[int]:
        """The best units of every one of those around them that stay, equally many of each."""
        had, each = self.had[kind][i], self.each[kind][i]
        ranked = getattr(self.scores, kind)[i].view(-1, had).argsort(dim=1, descending=True)
        best = ranked[:, :each].sort(dim=1).values
        return [unit * had + j for unit in around for j in best[unit].tolist()]
