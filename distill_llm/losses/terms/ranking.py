"""The order of the teacher's likeliest classes."""

from typing import TYPE_CHECKING

from pydantic import Field

from distill_llm.losses.terms.outputs import ClassTerm
from distill_llm.losses.terms.term import term

if TYPE_CHECKING:
    from torch import Tensor


@term("ranking")
class RankingLoss(ClassTerm):
    """Hinge on the student's order of the teacher's `top` likeliest classes (ranking SVM, Joachims, 2002).

    A mean over pairs of max(0, margin - (s_i - s_j)), in logits of the student. Pairs are those of the `top` classes, i before j
    for the teacher, and each of them with the student's likeliest class beyond them. A class that the teacher masks counts in no
    pair of the top ones.
    """

    top: int = Field(default=5, ge=1, description="Number of the teacher's likeliest classes.")
    margin: float = Field(
        default=1.0, gt=0, allow_inf_nan=False, description="Difference of logits that a pair should have."
    )

    def of_items(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The mean over the pairs of each item."""
        from torch import inf

        count = min(self.top, student.shape[-1])
        best = teacher.topk(count, dim=-1)
        scores = student.gather(-1, best.indices)
        rest = student.scatter(-1, best.indices, -inf).amax(-1, keepdim=True)
        after = scores.unsqueeze(-2).expand(*scores.shape, count)  # (items, i, j): the score of j
        there = (best.values != -inf) & (scores != -inf)
        pairs = (there.unsqueeze(-1) & there.unsqueeze(-2)).triu(1)
        within = (self.margin - (scores.unsqueeze(-1) - after).masked_fill(~pairs, 0)).clamp(min=0)
        beyond_there = there & (rest != -inf)
        beyond = (self.margin - (scores - rest).masked_fill(~beyond_there, 0)).clamp(min=0)
        total = (within * pairs).sum((-1, -2)) + (beyond * beyond_there).sum(-1)
        return total / (pairs.sum((-1, -2)) + beyond_there.sum(-1)).clamp(min=1)
