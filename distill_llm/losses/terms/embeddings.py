"""The distance of what the first layers read."""

from typing import TYPE_CHECKING, ClassVar

from distill_llm.losses.distances import StateDistance
from distill_llm.losses.terms.adapted import AdaptedTerm
from distill_llm.losses.terms.term import Signal, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("embeddings")
class EmbeddingsLoss(AdaptedTerm):
    """Distance between the outputs of the embedding layers (TinyBERT, Jiao et al., 2020)."""

    signals: ClassVar[tuple[Signal, ...]] = ("hidden",)

    distance: StateDistance = "mse"

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """The one place before the first layers."""
        from distill_llm.losses.mapping import LayerPair
        from distill_llm.losses.signals import EMBEDDINGS

        return [LayerPair(EMBEDDINGS, EMBEDDINGS)]

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over valid tokens (see `hidden_distance`)."""
        return match.state_distance(batch, pairs, self.distance, self.adapter)
