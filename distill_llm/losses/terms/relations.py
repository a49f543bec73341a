"""The divergence of the relations between tokens, for models of any width and number of heads."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.losses.layers import Layers
from distill_llm.losses.relation_heads import relation_heads
from distill_llm.losses.terms.paired import PairedTerm
from distill_llm.losses.terms.term import Signal, Use, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch

VECTORS = {"q": "query", "k": "key", "v": "value"}


@term("relations")
class RelationsLoss(PairedTerm):
    """Divergence between the relations of tokens by queries, keys and values (MiniLMv2, Wang et al., 2021)."""

    signals: ClassVar[tuple[Signal, ...]] = ("vectors",)

    layers: Layers = "last"
    pairs: list[Literal["qq", "kk", "vv"]] = Field(
        default=["qq", "kk", "vv"],
        min_length=1,
        description="which vectors are related: queries (qq), keys (kk), values (vv)",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        description="Number of relation heads; must divide the widths of both models. Left out: the largest that does, up to 12.",
    )

    def faults(self, use: Use) -> Iterator[InputError]:
        """The relation heads must divide the layers, whichever heads pruning leaves them."""
        yield from super().faults(use)
        if self.heads is None:
            return
        try:
            relation_heads(self.heads, use.vector_widths, "heads")
        except InputError as fault:
            yield fault
        if use.head_size is not None and use.head_size % self.heads:
            fix = f"leave it out, or give a divisor of {use.head_size}, the size of a head: pruning decides how many heads stay"
            yield InputError("heads", self.heads, fix=fix)

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `attention_pairs`; layers that lost all their heads are left out."""
        pairs = match.attention_pairs(self.layers, f"losses.{self.name}.layers")
        for pair in pairs:
            if widths := match.vector_widths(pair):
                relation_heads(self.heads, widths)
        return pairs

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over tokens and kinds of relations of the mean over layer pairs (see `relation_distance`)."""
        from distill_llm.losses.relations import relation_distance

        total = batch.zero()
        for pair in pairs:
            own, source = batch.own.vectors[pair.student], batch.target.vectors[pair.teacher]
            for kind in self.pairs:
                student, teacher = (getattr(vectors, VECTORS[kind[0]]) for vectors in (own, source))
                total = total + relation_distance(student, teacher, batch.valid, self.heads, sequences=batch.sequences)
        return total / max(1, len(pairs))
