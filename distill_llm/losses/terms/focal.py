"""Divergence of outputs, weighted by how sure the teacher is of each."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.losses.terms.outputs import ClassTerm
from distill_llm.losses.terms.term import term

if TYPE_CHECKING:
    from torch import Tensor


@term("focal")
class FocalLoss(ClassTerm):
    """KL(teacher || student) of each item times a power of the teacher's largest probability, or of what it lacks to 1.

    `doubt`: (1 - p)^gamma, as the focal loss (Lin et al., 2017) weighs items that are hard, here for the teacher.
    `confidence`: p^gamma, which trusts a sure teacher more. p is at temperature 1. Weights are not normalised.
    """

    by: Literal["doubt", "confidence"] = Field(
        default="doubt",
        description="What weighs more: items of which the teacher is unsure, or those of which it is sure.",
    )
    gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False, description="Power of the weight; 0 is plain KL.")
    temperature: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Divides the logits; the loss is multiplied by its square."
    )

    def of_items(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The weighted divergence of each item."""
        from distill_llm.losses.logits import logits_divergence

        sure = teacher.softmax(-1).amax(-1)
        weight = (sure if self.by == "confidence" else 1 - sure).clamp(min=0) ** self.gamma
        return weight * logits_divergence(student, teacher, "forward_kl", self.temperature)
