"""Neurons: intermediate channels of the FFN."""

from typing import TYPE_CHECKING

from distill_llm.pruning.units.kind import Candidate, Line, Load, UnitKind

if TYPE_CHECKING:
    from distill_llm.pruning.planning.candidate import Choice


class Neurons(UnitKind):
    """One channel between the FFN's linears."""

    name = scored = cuts = "neurons"
    fine = True

    def candidates(self, choice: "Choice") -> list[Candidate]:
        """Every neuron of every layer."""
        return [(i, j, value) for i, row in enumerate(choice.scores.neurons) for j, value in enumerate(row.tolist())]

    def price(self, choice: "Choice", i: int) -> float:
        """A neuron's rows and columns."""
        return choice.price("neurons", i)

    def remove(self, choice: "Choice", i: int, j: int) -> bool:
        """One neuron."""
        return choice.drop("neurons", i, slice(j, j + 1))

    def flops(self, load: Load) -> Line:
        """Its rows of the FFN's first linears, and its column of the last."""
        return 2.0 + 2.0 * sum(layout.count("n") for layout in load.family.ffn_in.values()), 0.0
