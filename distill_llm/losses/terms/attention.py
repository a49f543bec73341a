"""The distance of attention probabilities."""

from typing import TYPE_CHECKING, ClassVar

from distill_llm.losses.distances import MapDistance
from distill_llm.losses.terms.paired import PairedTerm
from distill_llm.losses.terms.term import Signal, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("attention")
class AttentionLoss(PairedTerm):
    """Distance between attention probabilities of mapped layers and heads."""

    signals: ClassVar[tuple[Signal, ...]] = ("attention",)

    distance: MapDistance = "kl"

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `attention_pairs`; layers that lost all their heads are left out."""
        return match.attention_pairs(self.layers, f"losses.{self.name}.layers")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over valid tokens of the mean over layer pairs (see `attention_distance`)."""
        from distill_llm.losses.attention import attention_distance

        total = batch.zero()
        for pair in pairs:
            own, source = batch.own.attention[pair.student], batch.target.attention[pair.teacher]
            if pair.heads is not None and pair.heads != tuple(range(source.query.shape[1])):
                source = source.select(match.indices(pair.heads, source.query.device))
            total = total + attention_distance(own, source, batch.valid, self.distance)
        return total / max(1, len(pairs))
