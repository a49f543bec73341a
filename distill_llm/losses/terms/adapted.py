"""A term that compares states channel by channel, whatever the widths of the two models."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill_llm.losses.terms.term import Term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.signals import Batch


class AdaptedTerm(Term):
    """Base of terms with the setting `adapter`, which counts where the student did not keep known channels of its teacher."""

    projects: ClassVar[bool] = True

    adapter: Literal["projection", "interpolation"] = Field(
        default="projection",
        description="What states of another width than the teacher's go through: a learned map, or interpolation of channels.",
    )

    @property
    def learns_projections(self) -> bool:
        """With `projection` alone."""
        return self.adapter == "projection"

    def states(self, batch: "Batch", match: "Match", pair: "LayerPair") -> "tuple[Tensor, Tensor]":
        """Two (B, T, H) hidden states of a pair (see `Match.states`)."""
        return match.states(batch, pair, self.adapter)
