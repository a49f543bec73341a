"""Correlations between examples by a kernel."""

from typing import TYPE_CHECKING

from pydantic import Field

from distill_llm.losses.terms.examples import ExampleTerm
from distill_llm.losses.terms.term import term

if TYPE_CHECKING:
    from torch import Tensor


@term("correlation")
class CorrelationLoss(ExampleTerm):
    """Squared difference of the correlations of examples by a Gaussian kernel (Peng et al., 2019).

    exp(-gamma |x - y|^2) of states at unit length, exactly, where the paper takes the first terms of its series. A mean over
    pairs of examples, each with itself too.
    """

    gamma: float = Field(default=0.4, gt=0, allow_inf_nan=False, description="Of the kernel: larger is narrower.")

    def of_examples(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The mean over pairs."""
        from distill_llm.losses.unit_length import at_unit_length

        def kernel(states: "Tensor") -> "Tensor":
            units = at_unit_length(states)
            return (2 * self.gamma * (units @ units.T - 1)).exp()

        return (kernel(student) - kernel(teacher)).square().mean()
