"""What stays of a model and what it costs, while a plan is being made."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill_llm.errors import InputError
from distill_llm.pruning.criteria import UNITS, Importance
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.structure import Costs, LayerShape


@dataclass(frozen=True)
class Limits:
    """The fewest heads (KV groups) and neurons that every remaining layer keeps."""

    heads: int = 0
    neurons: int = 0


NO_LIMITS = Limits()


class Choice:
    """What stays, while it is being chosen: per layer the kept heads, queries of a group, and neurons; the kept channels."""

    def __init__(
        self,
        scores: Importance,
        shapes: Sequence[LayerShape],
        costs: Costs,
        budget: float,
        units: frozenset[str],
        limits: Limits,
    ):
        self.scores, self.shapes, self.costs, self.budget = scores, shapes, costs, budget
        self.units, self.limits = units, limits
        self.alive = [True] * len(shapes)
        self.heads = [torch.ones(s.heads, dtype=torch.bool) for s in shapes]
        self.neurons = [torch.ones(s.neurons, dtype=torch.bool) for s in shapes]
        self.shared = [(s.queries or s.heads) // s.heads if s.heads else 1 for s in shapes]
        self.slots = list(self.shared)
        self.hidden = torch.ones(costs.hidden, dtype=torch.bool)
        # The same as numbers, to be quick.
        self.head_count = [s.heads for s in shapes]
        self.neuron_count = [s.neurons for s in shapes]
        self.width = costs.hidden

    def shape(self, i: int) -> LayerShape:
        return LayerShape(self.head_count[i], self.neuron_count[i], self.head_count[i] * self.slots[i])

    def living(self) -> list[LayerShape]:
        return [self.shape(i) for i, alive in enumerate(self.alive) if alive]

    def cost(self, width: int | None = None) -> float:
        return self.costs.of(self.living(), self.width if width is None else width)

    def price(self, kind: str, i: int) -> float:
        """What goes with the next unit of a kind."""
        head = self.costs.group_at(self.width) + self.slots[i] * self.costs.query_at(self.width)
        neuron = self.costs.neuron_at(self.width)
        if kind == "heads":
            return head
        if kind == "queries":
            return self.head_count[i] * self.costs.query_at(self.width)
        if kind == "neurons":
            return neuron
        if kind == "hidden":
            return self.costs.channel(self.living())
        parts = {"attention": self.head_count[i] * head, "ffn": self.neuron_count[i] * neuron}
        return parts[kind] if kind in parts else self.costs.of([self.shape(i)], self.width)

    def remove(self, kind: str, i: int, j: int) -> bool:
        """Remove a unit; False where it is gone already or must stay."""
        if kind == "hidden":
            self.hidden[j] = False
            self.width -= 1
            return True
        if not self.alive[i]:
            return False
        if kind == "layers":
            if sum(self.alive) == 1:
                return False
            self.alive[i] = False
        elif kind in ("heads", "attention"):
            gone = self.heads[i] if kind == "attention" else self.heads[i][j : j + 1]
            if self.head_count[i] - int(gone.sum()) < self.limits.heads or not gone.any():
                return False
            self.head_count[i] -= int(gone.sum())
            gone[:] = False
        elif kind == "queries":
            if self.slots[i] == 1:
                return False
            self.slots[i] -= 1
        else:
            gone = self.neurons[i] if kind == "ffn" else self.neurons[i][j : j + 1]
            if self.neuron_count[i] - int(gone.sum()) < self.limits.neurons or not gone.any():
                return False
            self.neuron_count[i] -= int(gone.sum())
            gone[:] = False
        return True

    def keep(self, kind: str, i: int, kept: torch.Tensor) -> None:
        """Set which heads or neurons of a layer stay."""
        if kind == "heads":
            self.heads[i][:] = kept
            self.head_count[i] = int(kept.sum())
        else:
            self.neurons[i][:] = kept
            self.neuron_count[i] = int(kept.sum())

    def reachable(self, left: float) -> None:
        if left > self.budget * (1 + 1e-9):
            total = self.costs.of(self.shapes)
            accepted = f"at least {left / total:.4f} when only {' and '.join(u for u in UNITS if u in self.units)} can be removed"
            raise InputError("keep", round(self.budget / total, 4), accepted)

    def plan(self, model_type: str, keep: float) -> PruningPlan:
        rows = []
        for i, alive in enumerate(self.alive):
            if alive:
                heads = tuple(self.heads[i].nonzero().flatten().tolist())
                rows.append(
                    LayerPlan(i, heads, tuple(self.neurons[i].nonzero().flatten().tolist()), self._queries(i, heads))
                )
        share, note = self.cost() / self.costs.of(self.shapes), None
        if abs(share - keep) > 0.01 * keep:
            note = f"kept {share:.4f} of the layers' {self.costs.name} where {keep} was asked for: "
            note += "these units come in larger steps"
        hidden = None if self.width == len(self.hidden) else tuple(self.hidden.nonzero().flatten().tolist())
        return PruningPlan(model_type, tuple(rows), share, note, hidden)

    def _queries(self, i: int, heads: tuple[int, ...]) -> tuple[int, ...] | None:
        if self.slots[i] == self.shared[i] or not heads:
            return None
        grouped = self.scores.queries[i].view(-1, self.shared[i])
        best = grouped.argsort(dim=1, descending=True)[:, : self.slots[i]].sort(dim=1).values
        return tuple(g * self.shared[i] + q for g in heads for q in best[g].tolist())
