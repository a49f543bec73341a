"""Whole layers."""

from typing import TYPE_CHECKING

from distill_llm.pruning.units.kind import Candidate, UnitKind

if TYPE_CHECKING:
    from distill_llm.pruning.planning.candidate import Choice


class Layers(UnitKind):
    """A layer with all that is left in it."""

    name = scored = "layers"
    source = "change"
    block = returns = True

    def candidates(self, choice: "Choice") -> list[Candidate]:
        """Every layer."""
        return [(i, i, value) for i, value in enumerate(choice.scores.layers.tolist())]

    def price(self, choice: "Choice", i: int) -> float:
        """All that is left of the layer."""
        return choice.costs.of([choice.shape(i)], choice.width, [i])

    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """The layer, if another one can be the last."""
        if not choice.may_lose_layer(i):
            return False
        choice.alive[i] = False
        return True
