"""A term that compares one embedding of each example with the teacher's, and remembers what it has seen."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.losses.layers import Layers
from distill_llm.losses.terms.adapted import AdaptedTerm
from distill_llm.losses.terms.paired import PairedTerm
from distill_llm.losses.terms.term import Signal
from distill_llm.losses.units import Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


class EmbeddedTerm(AdaptedTerm, PairedTerm):
    """Base of terms about embeddings at unit length: the pooled states of each example, in the channels of the teacher."""

    signals: ClassVar[tuple[Signal, ...]] = ("hidden",)
    packed_rows: ClassVar[bool] = False

    layers: Layers = "last"
    pool: Literal["mean", "first", "last"] = Field(
        default="mean", description="State of an example: the mean of its tokens', or the first or last token's."
    )

    def unit(self, kind: Kind) -> Unit:
        """Examples, whatever the model."""
        return "examples"

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `hidden_pairs`."""
        return match.hidden_pairs(self.layers, f"losses.{self.name}.layers")

    def embeddings(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "tuple[Tensor, Tensor]":
        """(B, L, H) of student and teacher, by layer pair, in fp32."""
        import torch

        from distill_llm.losses.examples import pooled
        from distill_llm.losses.unit_length import at_unit_length

        found = []
        for pair in pairs:
            states = batch.own.hidden[pair.student], batch.target.hidden[pair.teacher]
            own, source = (pooled(each, batch.valid, self.pool) for each in states)
            found.append(match.compared(own, source, pair, self.adapter))
        own, source = (at_unit_length(torch.stack(each, 1).float()) for each in zip(*found, strict=True))
        return own, source
