"""The section `pruning.scales`: a factor for every kept unit, learnt after a cut and folded into the weights."""

from typing import TYPE_CHECKING

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.pruning.learning.scaling import DEFAULT_SCALING, Scaling
from distill_llm.recipe.section import Section

if TYPE_CHECKING:
    from distill_llm.recipe.pruning import PruningSection


class ScalesSection(Section):
    """Learn one factor for every kept head (KV group) and neuron from the model before the cut; then fold them away."""

    steps: int = Field(default=DEFAULT_SCALING.steps, ge=1, description="of Adam, one batch of calibration rows each")
    learning_rate: float = Field(
        default=DEFAULT_SCALING.learning_rate,
        gt=0,
        allow_inf_nan=False,
        description="of the first step; it falls in a straight line to 0",
    )

    @property
    def scaling(self) -> Scaling:
        """What `learn_scales` takes."""
        return Scaling(self.steps, self.learning_rate)


def scales_faults(pruning: "PruningSection") -> list[InputError]:
    """Faults of scales beside other fields of a pruning section, named within it."""
    if pruning.scales is None:
        return []
    against = (
        (pruning.keep == 1, "leave it out: no unit is removed, so there is nothing for scales to repair"),
        (
            pruning.masks is not None,
            "leave it out: weights are trained with the masks, so there is nothing for scales to repair",
        ),
        (pruning.offload, "leave it out, or offload: both models must be on the device to learn scales"),
    )
    return [InputError("scales", pruning.scales.model_dump(), fix=fix) for applies, fix in against if applies]
