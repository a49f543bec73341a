"""A term that compares the two models' outputs item by item."""

from abc import abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from distill_llm.common.errors import InputError
from distill_llm.losses.terms.term import Signal, Term, Use

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.head_parts import Comparison, Part
    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


class OutputTerm(Term):
    """Base of terms with a value for the outputs of each item; a language model's logits are never held whole for them."""

    signals: ClassVar[tuple[Signal, ...]] = ("logits",)

    @abstractmethod
    def of_items(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The value of each item, (items,), of (items, C) logits in fp32; the teacher's have no gradient."""

    def _values(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """What `of_items` returns, checked: it must be (items,)."""
        from distill_llm.losses.items import values_of_items

        return values_of_items(self.of_items(student, teacher), len(student), f"losses.{self.name}.of_items")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over the outputs that count."""
        student, teacher = (each.logits[..., : match.classes].float() for each in (batch.own, batch.target))
        return batch.weighted(self._values(student, teacher)).sum()

    def in_head(self, batch: "Batch", match: "Match", factor: "Tensor") -> "Part":
        """The same, a block of items at a time."""
        from distill_llm.losses.head_parts import Comparison

        return head_part(Comparison(self._values, classes=match.classes), batch, factor)


class ClassTerm(OutputTerm):
    """Base of terms about classes: a single output, the value of a regression, has none."""

    def faults(self, use: Use) -> Iterator[InputError]:
        """A single output has no classes to compare."""
        yield from super().faults(use)
        yield from class_faults(use)


def class_faults(use: Use) -> Iterator[InputError]:
    """The fault of outputs that are no classes."""
    if use.single_output:
        fix = "remove it: a regression has no classes; logits with divergence mse or huber compares its values"
        yield InputError("", "a single output", fix=fix)


def head_part(how: "Comparison", batch: "Batch", factor: "Tensor", labels: "Tensor | None" = None) -> "Part":
    """The part of the head's losses for the signals that the teacher gives."""
    from distill_llm.losses.head_parts import DivergencePart, SparsePart
    from distill_llm.losses.signals import HeadSignals, SparseSignals

    if isinstance(batch.target, SparseSignals):
        return SparsePart(how, batch.target.targets, factor)
    assert isinstance(batch.target, HeadSignals)
    return DivergencePart(how, batch.target.head, batch.target.head_inputs, labels, factor, batch.weights)
