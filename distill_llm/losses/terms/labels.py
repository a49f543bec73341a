"""The loss against the true labels."""

from typing import TYPE_CHECKING, ClassVar

from distill_llm.losses.terms.term import Signal, Term, term
from distill_llm.losses.units import Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.head_parts import Part
    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("labels")
class LabelsLoss(Term):
    """Cross-entropy with the true labels (squared error for a regression task)."""

    signals: ClassVar[tuple[Signal, ...]] = ("logits",)
    needs_teacher: ClassVar[bool] = False
    of_data: ClassVar[bool] = True

    def unit(self, kind: Kind) -> Unit:
        """Labels, whatever the model."""
        return "labels"

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over labelled items (see `label_loss`); of a mixture of two, of both labels in their shares."""
        from distill_llm.losses.labels import label_loss

        losses = label_loss(batch.own.logits, batch.needed_labels("losses.labels"), match.smoothing)
        if batch.mixed is not None:
            others = label_loss(batch.own.logits, batch.mixed.labels, match.smoothing)
            losses = losses.lerp(others, 1 - batch.mixed.share)
        return losses.sum()

    def in_head(self, batch: "Batch", match: "Match", factor: "Tensor") -> "Part":
        """The same over the student's whole vocabulary, a block of items at a time."""
        from distill_llm.losses.head_parts import LabelPart

        return LabelPart(batch.needed_labels("losses.labels"), match.smoothing, factor)
