"""Queries: one query head of every group of a layer at a time, so that groups stay alike."""

from typing import TYPE_CHECKING

from distill_llm.pruning.units.kind import Candidate, UnitKind

if TYPE_CHECKING:
    from distill_llm.pruning.planning.candidate import Choice


class Queries(UnitKind):
    """The least query of every group of a layer."""

    name = scored = cuts = "queries"

    def candidates(self, choice: "Choice") -> list[Candidate]:
        """The least queries of all groups of a layer, then the next; the last ones stay."""
        rows = [
            (i, row.view(-1, choice.shared[i]).sort(dim=1).values.sum(0)[:-1])
            for i, row in enumerate(choice.scores.queries)
            if len(row)
        ]
        return [(i, j, value) for i, row in rows for j, value in enumerate(row.tolist())]

    def price(self, choice: "Choice", i: int) -> float:
        """A query of every group."""
        return choice.count["heads"][i] * choice.costs.query_at(choice.width, i)

    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """One query of every group."""
        if choice.slots[i] == 1:
            return False
        choice.slots[i] -= 1
        return True
