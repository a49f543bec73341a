"""A term that compares the relations between the examples of a batch."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.losses.layers import Layers
from distill_llm.losses.terms.paired import PairedTerm
from distill_llm.losses.terms.term import Signal, Use
from distill_llm.losses.units import Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


class ExampleTerm(PairedTerm):
    """Base of terms about relations between examples, from a state of each in every paired layer, of any width.

    They depend on how a step's rows are split: examples are related within a micro-batch, or within the micro-batches of all
    processes together (`over: processes`), never with those of another accumulation step.

    Attributes:
        least: how many examples a relation takes: with fewer there is nothing to learn.
    """

    signals: ClassVar[tuple[Signal, ...]] = ("hidden",)
    packed_rows: ClassVar[bool] = False
    least: ClassVar[int] = 2

    layers: Layers = "last"
    pool: Literal["mean", "first", "last"] = Field(
        default="mean", description="State of an example: the mean of its tokens', or the first or last token's."
    )
    over: Literal["micro_batch", "processes"] = Field(
        default="micro_batch",
        description="Examples that are related: those of a process's micro-batch, or those of all processes' at once.",
    )

    def unit(self, kind: Kind) -> Unit:
        """Examples, whatever the model."""
        return "examples"

    def faults(self, use: Use) -> Iterator[InputError]:
        """There must be enough examples to relate."""
        yield from super().faults(use)
        if use.rows is not None and (rows := use.rows[self.over == "processes"]) < self.least:
            accepted = f"{self.least} or more: relations are between the rows of per_device_train_batch_size"
            yield InputError("over", f"{self.over}, with rows at once: {rows}", accepted)

    def layer_pairs(self, match: "Match") -> "list[LayerPair]":
        """See `hidden_pairs`."""
        return match.hidden_pairs(self.layers, f"losses.{self.name}.layers")

    @abstractmethod
    def of_examples(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The mean over relations, 0-dim, of (E, H) and (E, H') states in fp32; the teacher's have no gradient."""

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The number of examples times the mean over relations and layer pairs."""
        from distill_llm.losses.examples import over_examples, pooled

        total = batch.zero()
        for pair in pairs:
            states = batch.own.hidden[pair.student], batch.target.hidden[pair.teacher]
            own, source = (pooled(each, batch.valid, self.pool) for each in states)
            total = total + over_examples(self.of_examples, own, source, self.over == "processes")
        return total / len(pairs)
