"""The whole FFN of a layer."""

from typing import TYPE_CHECKING

from distill_llm.pruning.units.kind import Candidate, UnitKind

if TYPE_CHECKING:
    from distill_llm.pruning.planning.candidate import Choice


class Ffn(UnitKind):
    """All neurons that are left of a layer."""

    name = scored = "ffn"
    cuts = "neurons"
    source = "together"
    block = True

    def candidates(self, choice: "Choice") -> list[Candidate]:
        """The FFN of every layer."""
        assert choice.scores.ffn is not None
        return [(i, i, value) for i, value in enumerate(choice.scores.ffn.tolist())]

    def price(self, choice: "Choice", i: int) -> float:
        """All neurons that are left."""
        return choice.count["neurons"][i] * choice.price("neurons", i)

    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """All neurons of the layer."""
        return choice.drop("neurons", i, slice(None))
