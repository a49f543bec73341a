"""Similarities between examples."""

from typing import TYPE_CHECKING

from distill_llm.losses.terms.examples import ExampleTerm
from distill_llm.losses.terms.term import term

if TYPE_CHECKING:
    from torch import Tensor


@term("similarity")
class SimilarityLoss(ExampleTerm):
    """Squared difference of the Gram matrices of a batch, each row at unit length (Tung and Mori, 2019).

    A mean over the entries.
    """

    def of_examples(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The mean over pairs of examples, each with itself too."""
        from distill_llm.losses.unit_length import at_unit_length

        own, source = (at_unit_length(each @ each.T) for each in (student, teacher))
        return (own - source).square().mean()
