"""What stays of a model and what it costs, while a plan is being made."""

from collections.abc import Sequence

import torch

from distill_llm.architectures.lineage import Counts
from distill_llm.common.errors import InputError
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.planning.rules import PlanningRules
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.kinds import KINDS

NEAR = 0.99
"""The part of a budget that a plan should use at least."""


class Choice:
    """What stays, while it is being chosen: per layer the kept heads, queries of a group, and neurons; the kept channels."""

    def __init__(
        self, scores: Importance, shapes: Sequence[Counts], costs: Costs, budget: float, rules: PlanningRules
    ) -> None:
        self.scores, self.shapes, self.costs, self.budget, self.rules = scores, shapes, costs, budget, rules
        self.alive = [True] * len(shapes)
        self.kept = {k: [torch.ones(s[k], dtype=torch.bool) for s in shapes] for k in ("heads", "neurons")}
        self.shared = [s["queries"] // s["heads"] if s["heads"] else 1 for s in shapes]
        self.slots = list(self.shared)
        self.count = {kind: [s[kind] for s in shapes] for kind in self.kept}  # the same as numbers, to be quick
        self.width = costs.hidden
        self.least = rules.least(shapes)
        least_width = rules.least_width(costs.hidden)
        self._least_costs = [costs.of([row], least_width, [i]) for i, row in enumerate(self.least)]

    def shape(self, i: int) -> Counts:
        """How many units of every kind layer `i` keeps."""
        heads = self.count["heads"][i]
        return {"heads": heads, "neurons": self.count["neurons"][i], "queries": heads * self.slots[i]}

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

    def drop(self, kind: str, i: int, where: slice) -> bool:
        """Remove heads or neurons of a layer; False where they are gone already or too few would be left."""
        gone = self.kept[kind][i][where]
        if self.count[kind][i] - int(gone.sum()) < self.least[i][kind] or not gone.any():
            return False
        self.count[kind][i] -= int(gone.sum())
        gone[:] = False
        return True

    def may_lose_layer(self, i: int) -> bool:
        """Whether the budget can be met without a layer: by one of the others alone, cut down to the least."""
        others = [k for k in self.rules.last_layers(len(self.shapes)) if self.alive[k] and k != i]
        return any(self.fits(self._least_costs[k]) for k in others)

    def put_back(self, kind: str, i: int, j: int) -> None:
        """Undo the removal of a head or a layer."""
        if kind == "layers":
            self.alive[i] = True
        else:
            self.kept[kind][i][j] = True
            self.count[kind][i] += 1

    def keep(self, kind: str, i: int, count: int) -> None:
        """Keep the best `count` heads or neurons of a layer."""
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
        rows = []
        for i, alive in enumerate(self.alive):
            if alive:
                heads = tuple(self.kept["heads"][i].nonzero().flatten().tolist())
                rows.append(
                    LayerPlan(
                        i, heads, tuple(self.kept["neurons"][i].nonzero().flatten().tolist()), self._queries(i, heads)
                    )
                )
        share, note = self.cost() / self.costs.of(self.shapes), None
        if abs(share - keep) > 0.01 * keep:
            note = f"kept {share:.4f} of the layers' {self.costs.name} instead of {keep}: "
            sizes = [{shape[k] for shape in self.shapes} - {0} for k in ("heads", "neurons")]
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

    def _queries(self, i: int, heads: tuple[int, ...]) -> tuple[int, ...] | None:
        if self.slots[i] == self.shared[i] or not heads:
            return None
        grouped = self.scores.queries[i].view(-1, self.shared[i])
        best = grouped.argsort(dim=1, descending=True)[:, : self.slots[i]].sort(dim=1).values
        return tuple(g * self.shared[i] + q for g in heads for q in best[g].tolist())
