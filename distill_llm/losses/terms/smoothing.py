"""Cross-entropy with labels that are smoothed as far as the teacher is unsure of them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.losses.terms.outputs import class_faults
from distill_llm.losses.terms.term import Signal, Term, Use, term
from distill_llm.losses.units import Kind, Unit

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("smoothing")
class SmoothingLoss(Term):
    """Cross-entropy with the true labels, each smoothed by the teacher's own doubt.

    The share of a label that is spread evenly over the classes (Szegedy et al., 2016) is one less the teacher's
    largest probability at `temperature`. Where this is the temperature that calibrates the teacher (Guo et al., 2017;
    `distill_llm.losses.calibration.calibrating_temperature`), it is the rate at which the teacher errs on such items.
    """

    signals: ClassVar[tuple[Signal, ...]] = ("logits",)
    of_data: ClassVar[bool] = True

    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Divides the teacher's logits: the one that calibrates it."
    )

    def unit(self, kind: Kind) -> Unit:
        """Labels, whatever the model."""
        return "labels"

    def faults(self, use: Use) -> Iterator[InputError]:
        """It needs one label of an item, a class."""
        yield from super().faults(use)
        yield from class_faults(use)
        if use.mixed:
            yield InputError("", f"examples of two labels ({use.mixed})", "examples of one label each")

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over labelled items."""
        from distill_llm.losses.labels import label_loss

        student, teacher = (each.logits[..., : match.classes].float() for each in (batch.own, batch.target))
        labels = batch.needed_labels(f"losses.{self.name}")
        spread = 1 - (teacher / self.temperature).softmax(-1).amax(-1)
        return label_loss(student, labels).lerp(label_loss(student, labels, 1.0), spread).sum()
