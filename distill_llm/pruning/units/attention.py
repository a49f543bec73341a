"""The whole attention of a layer."""

from typing import TYPE_CHECKING

from distill_llm.pruning.units.kind import Candidate, UnitKind

if TYPE_CHECKING:
    from distill_llm.pruning.planning.candidate import Choice


class Attention(UnitKind):
    """All heads that are left of a layer."""

    name = scored = "attention"
    cuts = "heads"
    source = "together"
    block = True

    def candidates(self, choice: "Choice") -> list[Candidate]:
        """The attention of every layer."""
        assert choice.scores.attention is not None
        return [(i, i, value) for i, value in enumerate(choice.scores.attention.tolist())]

    def price(self, choice: "Choice", i: int) -> float:
        """All heads that are left."""
        return choice.count["heads"][i] * choice.price("heads", i)

    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """All heads of the layer."""
        return choice.drop("heads", i, slice(None))
