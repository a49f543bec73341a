"""Skewed divergences, another one for each source of an answer."""

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from distill_llm.losses.terms.outputs import ClassTerm
from distill_llm.losses.terms.term import Signal, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.head_parts import Part
    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


@term("distillm2")
class DistiLLM2Loss(ClassTerm):
    """Skewed KL on the data's answers, the teacher's, and skewed reverse KL on the student's (DistiLLM-2, Ko et al., 2025).

    (1 - beta) KL(p, skew p + (1 - skew) q) of each token of the data, and beta KL(q, (1 - skew) p + skew q) of each token of the
    student's answers: the first pulls the student to what its teacher says, the second pushes it from what only it says. With
    `responses: {beside: true}` both are in one batch.
    """

    signals: ClassVar[tuple[Signal, ...]] = ("logits",)

    skew: float = Field(default=0.1, gt=0, lt=1, description="Share of a model's own distribution in the mixture.")
    beta: float = Field(default=0.5, ge=0, le=1, description="Share of the student's answers.")

    def of_items(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """Of items of the data, without their share."""
        from distill_llm.losses.logits import logits_divergence

        return logits_divergence(student, teacher, "skew_kl", skew=self.skew)

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over the outputs of both kinds."""
        from torch import cat

        from distill_llm.losses.logits import logits_divergence

        student, teacher = (each.logits[..., : match.classes].float() for each in (batch.own, batch.target))
        border = self._border(batch, len(student))
        parts = zip(("skew_kl", "skew_reverse_kl"), (slice(border), slice(border, None)), strict=True)
        values = [logits_divergence(student[part], teacher[part], name, skew=self.skew) for name, part in parts]
        return (batch.weighted(cat(values)) * self._shares(batch, len(student))).sum()

    def in_head(self, batch: "Batch", match: "Match", factor: "Tensor") -> "Part":
        """The same, a block of items at a time."""
        from distill_llm.losses.head_parts import Comparison, SplitPart
        from distill_llm.losses.signals import HeadSignals

        assert isinstance(batch.target, HeadSignals)
        items = len(batch.target.head_inputs)
        first, later = (
            Comparison(name, {"skew": self.skew}, classes=match.classes) for name in ("skew_kl", "skew_reverse_kl")
        )
        weights = batch.weighted(self._shares(batch, items))
        teacher = batch.target.head, batch.target.head_inputs
        return SplitPart(first, later, self._border(batch, items), *teacher, weights, factor)

    def _border(self, batch: "Batch", items: int) -> int:
        return items if batch.data_items is None else batch.data_items

    def _shares(self, batch: "Batch", items: int) -> "Tensor":
        from torch import arange, float32

        device = batch.valid.device
        own = arange(items, device=device) >= self._border(batch, items)
        return own.to(float32) * (2 * self.beta - 1) + (1 - self.beta)
