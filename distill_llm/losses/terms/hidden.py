"""The distance of hidden states."""

from typing import TYPE_CHECKING, ClassVar

from distill_llm.losses.distances import StateDistance
from distill_llm.losses.terms.adapted import AdaptedTerm
from distill_llm.losses.terms.paired import PairedTerm
from distill_llm.losses.terms.term import Signal, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("hidden")
class HiddenLoss(AdaptedTerm, PairedTerm):
    """Distance between hidden states of mapped layers."""

    signals: ClassVar[tuple[Signal, ...]] = ("hidden",)

    distance: StateDistance = "mse"

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `hidden_pairs`."""
        return match.hidden_pairs(self.layers, f"losses.{self.name}.layers")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over valid tokens of the mean over layer pairs (see `hidden_distance`)."""
        return match.state_distance(batch, pairs, self.distance, self.adapter)
