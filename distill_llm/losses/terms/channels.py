"""Correlations between channels."""

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


@term("channels")
class ChannelsLoss(AdaptedTerm, PairedTerm):
    """Squared difference of the correlations between channels over an example's tokens (ICKD, Liu et al., 2021).

    A correlation is the cosine of two channels over the valid tokens; the value of an example is a mean over pairs of
    channels. It holds H x H numbers of each example and layer pair.
    """

    signals: ClassVar[tuple[Signal, ...]] = ("hidden",)
    packed_rows: ClassVar[bool] = False

    layers: Layers = "last"

    def unit(self, kind: Kind) -> Unit:
        """Examples, whatever the model."""
        return "examples"

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `hidden_pairs`."""
        return match.hidden_pairs(self.layers, f"losses.{self.name}.layers")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over examples of the mean over pairs of channels and layer pairs."""
        from distill_llm.losses.unit_length import at_unit_length

        total, valid = batch.zero(), batch.valid.float().unsqueeze(-1)
        for pair in pairs:
            own, source = (at_unit_length(each.float() * valid, 1) for each in self.states(batch, match, pair))
            difference = own.transpose(1, 2) @ own - source.transpose(1, 2) @ source
            total = total + difference.square().mean((1, 2)).sum()
        return total / len(pairs)
