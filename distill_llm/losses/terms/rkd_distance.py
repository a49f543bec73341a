"""Distances between examples."""

from typing import TYPE_CHECKING

from distill_llm.losses.terms.examples import ExampleTerm
from distill_llm.losses.terms.term import term

if TYPE_CHECKING:
    from torch import Tensor


@term("rkd_distance")
class RkdDistanceLoss(ExampleTerm):
    """Huber distance of the distances between examples, over their mean (RKD-D, Park et al., 2019).

    A mean over pairs of examples; the mean distance that divides is of each model's own pairs.
    """

    def of_examples(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The mean over pairs."""
        from torch.nn.functional import smooth_l1_loss

        from distill_llm.losses.examples import distances, mean_over, others

        pairs = others(len(student), student.device)
        own, source = (each / mean_over(each, pairs).clamp(min=1e-12) for each in map(distances, (student, teacher)))
        return mean_over(smooth_l1_loss(own, source, reduction="none"), pairs)
