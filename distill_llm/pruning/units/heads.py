"""Heads: KV groups where queries share keys, each with its queries."""

from typing import TYPE_CHECKING

from distill_llm.pruning.units.kind import Candidate, Line, Load, UnitKind

if TYPE_CHECKING:
    from distill_llm.pruning.planning.candidate import Choice


class Heads(UnitKind):
    """A group's key and value, and the queries that are left of it."""

    name = scored = cuts = "heads"
    returns = True

    def candidates(self, choice: "Choice") -> list[Candidate]:
        """Every head of every layer."""
        return [(i, j, value) for i, row in enumerate(choice.scores.heads) for j, value in enumerate(row.tolist())]

    def price(self, choice: "Choice", i: int) -> float:
        """A group and its queries."""
        return choice.price("heads", i)

    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """One head."""
        return choice.drop("heads", i, slice(j, j + 1))

    def flops(self, load: Load) -> Line:
        """The projections of its key and its value."""
        return 4.0 * load.head_size, 0.0

    def held(self, load: Load) -> list[float]:
        """The keys and values of the cached tokens, where each group has its own."""
        return [] if load.family.caches_queries else [2 * load.head_size * tokens for tokens in load.cached]
