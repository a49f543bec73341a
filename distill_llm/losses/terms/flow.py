"""The flow between layers: how states of one layer go with those of the next."""

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar

from distill_llm.losses.layers import Layers
from distill_llm.losses.terms.adapted import AdaptedTerm
from distill_llm.losses.terms.paired import PairedTerm
from distill_llm.losses.terms.term import Signal, term
from distill_llm.losses.units import Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("flow")
class FlowLoss(AdaptedTerm, PairedTerm):
    """Squared difference of the FSP matrices of consecutive paired layers (Yim et al., 2017).

    The matrix of an example is the mean over its valid tokens of the product of a channel in one layer and a channel in the
    next; the value is a mean over entries (the paper's is a sum). The first layer is what the first layer of a model reads, so
    that `last` has one flow, through the whole model. It holds H x H numbers of each example and flow.
    """

    signals: ClassVar[tuple[Signal, ...]] = ("hidden",)
    packed_rows: ClassVar[bool] = False

    layers: Layers = "uniform"

    def unit(self, kind: Kind) -> Unit:
        """Examples, whatever the model."""
        return "examples"

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """Before the first layers, and then as of `hidden_pairs`."""
        from distill_llm.losses.mapping import LayerPair
        from distill_llm.losses.signals import EMBEDDINGS

        return [
            LayerPair(EMBEDDINGS, EMBEDDINGS),
            *match.hidden_pairs(self.layers, f"losses.{self.name}.layers"),
        ]

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over examples of the mean over entries and flows."""
        total, valid = batch.zero(), batch.valid.float().unsqueeze(-1)
        states = [[each.float() * valid for each in self.states(batch, match, pair)] for pair in pairs]
        tokens = valid.sum(1, keepdim=True).clamp(min=1)
        for before, after in pairwise(states):
            own, source = (first.transpose(1, 2) @ last / tokens for first, last in zip(before, after, strict=True))
            total = total + (own - source).square().mean((1, 2)).sum()
        return total / (len(pairs) - 1)
