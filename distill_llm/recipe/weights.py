"""The section `pruning.weights`: single weights that become zero."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from distill_llm.common.errors import InputError, raise_all
from distill_llm.pruning.weights.rules import WEIGHT_CRITERIA, SparsityRules
from distill_llm.recipe.section import Section


class WeightsSection(Section):
    """Single weights of the layers' linears to set to zero, after whole units are removed. They stay zero in recovery."""

    sparsity: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="share of the weights of all linears inside the layers that is zero after the last round; left out with a"
        " pattern N:M, which says it",
    )
    pattern: str = Field(
        default="unstructured",
        description="unstructured, or N:M: N of every M neighbours in a row stay, as 2:4 and 4:8; some GPUs compute faster with"
        " 2:4, nothing computes faster with zeros elsewhere",
    )
    criterion: str = Field(
        default="wanda", description=f"how the importance of a weight is measured: {', '.join(WEIGHT_CRITERIA)}"
    )
    scope: Literal["row", "matrix", "global"] | None = Field(
        default=None,
        description="where weights compete if unstructured: within each output row, within each matrix, or over all; left out: as"
        " in the criterion's paper (magnitude and sparsegpt: matrix, wanda: row, taylor: global)",
    )
    layers_at_once: int | None = Field(
        default=None,
        ge=1,
        description="number of layers that are looked at in one pass over the calibration rows. Each group sees the inputs that"
        " the sparse layers before it give, and holds its own second moments alone. Left out: one pass for all layers",
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _no_minutes(cls, given: Any) -> Any:
        """YAML 1.1 reads 2:4 without quotes as 2 minutes and 4 seconds: 124."""
        return f"{given // 60}:{given % 60}" if isinstance(given, int) and given > 60 else given

    @model_validator(mode="after")
    def _consistent(self) -> "WeightsSection":
        rules, faults = self.rules, []  # its own faults name its fields
        if self.layers_at_once is not None and rules.needs == "nothing":
            fix = f"leave it out: {self.criterion} reads no calibration rows"
            faults.append(InputError("layers_at_once", self.layers_at_once, fix=fix))
        if self.layers_at_once is not None and rules.groups is None and rules.competing == "global":
            fix = "leave it out, or set scope to row or matrix: with global, all layers are compared at once"
            faults.append(InputError("layers_at_once", self.layers_at_once, fix=fix))
        raise_all(faults)
        return self

    @property
    def rules(self) -> SparsityRules:
        """Which weights go."""
        return SparsityRules(self.sparsity, self.pattern, self.criterion, self.scope)
