"""The rules of a plan: what may be removed, and what every layer keeps. Needs no torch, so that recipes can hold them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from distill_llm.common.errors import InputError
from distill_llm.pruning.units.kinds import KINDS

Scope = Literal["global", "local"]
SEARCHED = ("heads", "neurons", "layers")
"""Units whose numbers are searched."""


@dataclass(frozen=True)
class Limits:
    """The fewest heads (KV groups) and neurons that every remaining layer keeps; a layer that has fewer keeps all."""

    heads: int = 0
    neurons: int = 0


NO_LIMITS = Limits()


class RuleOptions(TypedDict, total=False):
    """`PlanningRules` as keywords of `plan_pruning`."""

    units: Sequence[str]
    scope: Scope
    round_to: int
    uniform: bool
    limits: Limits


@dataclass(frozen=True)
class PlanningRules:
    """What a plan may remove; the fields are explained at `plan_pruning`.

    Attributes:
        anchored: whether the first layer always stays, as a model's family may ask for.
    """

    units: Sequence[str] = ("heads", "neurons")
    scope: Scope = "global"
    round_to: int = 1
    uniform: bool = False
    limits: Limits = NO_LIMITS
    anchored: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", tuple(dict.fromkeys(self.units)))

    @property
    def local(self) -> bool:
        """Whether every layer keeps the same share of its own units, which leaves a head to each layer that has one."""
        return self.uniform or self.scope == "local"

    def cuts(self, kind: str, limit: int) -> bool:
        """Whether units of this kind may go from a layer; in whole blocks only where there is no limit."""
        return any(KINDS[unit].cuts == kind and not (KINDS[unit].block and limit) for unit in self.units)

    def last_layers(self, count: int) -> range:
        """Which of `count` layers may be the only one that stays."""
        return range(1 if self.anchored else count)

    def least_width(self, hidden: int) -> int:
        """The fewest channels of the residual stream that have to stay."""
        return min(self.round_to, hidden) if "hidden" in self.units else hidden


DEFAULT_RULES = PlanningRules()


def search_faults(rules: PlanningRules) -> list[InputError]:
    """A fault for every rule that leaves nothing to search, or that a search does not keep."""
    faults = []
    if other := [unit for unit in rules.units if unit not in SEARCHED]:
        accepted = f"one or more of {', '.join(SEARCHED)}: of these the numbers are searched"
        faults.append(InputError("units", other, accepted))
    if rules.uniform:
        fix = "set it to false: a search finds out how much each layer keeps"
        faults.append(InputError("uniform", True, fix=fix))
    if rules.scope == "local":
        fix = "set it to global: a search finds out how much each layer keeps"
        faults.append(InputError("scope", "local", fix=fix))
    return faults
