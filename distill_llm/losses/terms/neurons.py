"""Which neurons of the FFNs fire."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from distill_llm.losses.terms.paired import PairedTerm
from distill_llm.losses.terms.term import Signal, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("neurons")
class NeuronsLoss(PairedTerm):
    """Hinge on the side of zero on which each FFN neuron is before its activation (Heo et al., 2019, AAAI).

    The square of max(0, margin - s) where the teacher's neuron fires (is above 0), of max(0, margin + s) where it does not, s
    being the student's neuron: a mean over neurons. Each neuron of a pruned student is compared with the one that it was copied
    from; those of other students one by one, where both FFNs are of one width. In a gated FFN it is the gate's neuron.
    """

    signals: ClassVar[tuple[Signal, ...]] = ("neurons",)

    margin: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="How far from zero a neuron should be, on its side."
    )

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `Match.ffn_pairs`."""
        return match.ffn_pairs(self.layers, f"losses.{self.name}.layers")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over valid tokens of the mean over neurons and layer pairs."""
        total = batch.zero()
        for pair in pairs:
            own, source = batch.own.neurons[pair.student], batch.target.neurons[pair.teacher]
            if (chosen := match.neurons(pair)) is not None:
                source = source.index_select(-1, match.indices(chosen, source.device))
            own = own.float()
            values = (self.margin - own.where(source > 0, -own)).clamp(min=0).square().mean(-1)
            total = total + (values * batch.valid.float()).sum()
        return total / len(pairs)
