"""Channels of the residual stream, in steps of `round_to`."""

from typing import TYPE_CHECKING

from distill_llm.pruning.units.kind import Candidate, UnitKind

if TYPE_CHECKING:
    from distill_llm.pruning.planning.candidate import Choice


class Hidden(UnitKind):
    """The next step of channels, which go from all layers at once."""

    name = scored = "hidden"
    source = "stream"
    in_layer = False
    in_order = True

    def candidates(self, choice: "Choice") -> list[Candidate]:
        """All steps but the last, which stays; the least first."""
        assert choice.scores.hidden is not None
        ranked = choice.scores.hidden.sort().values[-choice.width :]
        steps = ranked.split(choice.rules.round_to)[:-1]
        return [(0, j, step.sum().item()) for j, step in enumerate(steps)]

    def price(self, choice: "Choice", i: int) -> float:
        """A step of channels, through all layers that are left."""
        return choice.rules.round_to * choice.costs.channel(map(choice.shape, choice.living()))

    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """One step of channels."""
        choice.narrow(choice.width - choice.rules.round_to)
        return True
