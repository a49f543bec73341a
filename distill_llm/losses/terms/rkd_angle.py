"""Angles between examples."""

from typing import TYPE_CHECKING, ClassVar

from distill_llm.losses.terms.examples import ExampleTerm
from distill_llm.losses.terms.term import term

if TYPE_CHECKING:
    from torch import Tensor


@term("rkd_angle")
class RkdAngleLoss(ExampleTerm):
    """Huber distance of the cosines of the angles that three examples make (RKD-A, Park et al., 2019).

    A mean over triples of different examples. It holds E x E x H numbers of the E examples that are related.
    """

    least: ClassVar[int] = 3

    def of_examples(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The mean over triples."""
        from torch.nn.functional import smooth_l1_loss

        from distill_llm.losses.examples import mean_over, others

        apart = others(len(student), student.device)
        triples = apart.unsqueeze(0) & apart.unsqueeze(1) & apart.unsqueeze(2)  # at j, between i and k
        return mean_over(smooth_l1_loss(angles(student), angles(teacher), reduction="none"), triples)


def angles(states: "Tensor") -> "Tensor":
    """(E, E, E) cosines at example j of the angle between i and k, as [j, i, k]."""
    from distill_llm.losses.unit_length import at_unit_length

    edges = at_unit_length(states.unsqueeze(0) - states.unsqueeze(1))
    return edges @ edges.transpose(1, 2)
