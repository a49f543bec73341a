"""What single weights go and how they are chosen, as settings. Needs no torch, so that recipes can hold them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from distill_llm.common.errors import InputError, one_of, raise_all

Scope = Literal["row", "matrix", "global"]
SCOPES: tuple[Scope, ...] = ("row", "matrix", "global")
Need = Literal["nothing", "norms", "gradients", "moments"]
UNSTRUCTURED = "unstructured"


@dataclass(frozen=True)
class WeightCriterion:
    """A criterion of single weights and what is known of it before a model is loaded.

    Attributes:
        needs: what is collected of every linear over calibration data: nothing; norms of the inputs' features; for every
            weight the gradient of the loss; the second moments of the inputs.
        scope: where weights compete in the paper.
        paper: where it comes from.
    """

    needs: Need
    scope: Scope
    paper: str


WEIGHT_CRITERIA: Mapping[str, WeightCriterion] = {
    "magnitude": WeightCriterion("nothing", "matrix", "Han et al. 2015"),
    "taylor": WeightCriterion("gradients", "global", "Molchanov et al. 2019"),
    "wanda": WeightCriterion("norms", "row", "Sun et al. 2024"),
    "sparsegpt": WeightCriterion("moments", "matrix", "Frantar and Alistarh 2023"),
}


def groups_in(pattern: str) -> tuple[int, int] | None:
    """(N, M) of the pattern "N:M"; None for "unstructured".

    Raises:
        InputError: neither.
    """
    if pattern == UNSTRUCTURED:
        return None
    found = re.fullmatch(r"([1-9]\d?):([1-9]\d?)", pattern)
    if found is None or int(found[1]) >= int(found[2]):
        raise InputError(
            "pattern", pattern, "unstructured, or N:M with N below M, such as 2:4: N of every M weights stay"
        )
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class SparsityRules:
    """Which single weights go.

    Attributes:
        sparsity: the share of the weights that becomes zero, in (0, 1); None with a pattern N:M, which says it.
        pattern: "unstructured", or "N:M": N of every M neighbours along a linear's inputs stay.
        criterion: one of WEIGHT_CRITERIA.
        scope: where unstructured weights compete: within each output row, each matrix, or over all matrices (global); None: as
            in the criterion's paper.
        damping: sparsegpt: the share of the mean diagonal of the second moments that is added to the diagonal.
        block: sparsegpt: columns of which the weights to remove are chosen at a time.

    Raises:
        InputError: a value out of range, or two that contradict each other.
    """

    sparsity: float | None = None
    pattern: str = UNSTRUCTURED
    criterion: str = "wanda"
    scope: Scope | None = None
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        raise_all(self._faults())

    def _faults(self) -> list[InputError]:
        faults = []
        try:
            groups = groups_in(self.pattern)
        except InputError as error:
            return [error]
        if self.criterion not in WEIGHT_CRITERIA:
            faults.append(InputError("criterion", self.criterion, one_of(WEIGHT_CRITERIA, self.criterion)))
        if self.scope is not None and self.scope not in SCOPES:
            faults.append(InputError("scope", self.scope, one_of(SCOPES, self.scope)))
        if groups is None and (self.sparsity is None or not 0 < self.sparsity < 1):
            faults.append(InputError("sparsity", self.sparsity, "a number above 0 and below 1"))
        if groups is not None:
            share = 1 - groups[0] / groups[1]
            if self.sparsity is not None and abs(self.sparsity - share) > 1e-6:
                fix = f"leave it out, or set it to {share:g}: that is what the pattern {self.pattern} removes"
                faults.append(InputError("sparsity", self.sparsity, fix=fix))
            if self.scope is not None:
                fix = f"leave it out: with the pattern {self.pattern}, weights compete within a group"
                faults.append(InputError("scope", self.scope, fix=fix))
        if self.criterion == "sparsegpt" and self.scope not in (None, "matrix"):
            fix = "leave it out: sparsegpt chooses within blocks of a matrix's columns"
            faults.append(InputError("scope", self.scope, fix=fix))
        if self.damping <= 0 or self.block < 1:
            faults.append(InputError("damping, block", (self.damping, self.block), "numbers above 0"))
        return faults

    @property
    def groups(self) -> tuple[int, int] | None:
        """(N, M) of a pattern N:M; None where it is unstructured."""
        return groups_in(self.pattern)

    @property
    def share(self) -> float:
        """The share of the weights that becomes zero."""
        if (groups := self.groups) is not None:
            return 1 - groups[0] / groups[1]
        assert self.sparsity is not None
        return self.sparsity

    @property
    def needs(self) -> Need:
        """What the criterion needs."""
        return WEIGHT_CRITERIA[self.criterion].needs

    @property
    def competing(self) -> Scope:
        """Where unstructured weights compete."""
        return self.scope or WEIGHT_CRITERIA[self.criterion].scope

    def in_group(self, progress: float) -> int:
        """How many of every M weights are zero at this progress, in (0, 1], of a pattern N:M."""
        groups = self.groups
        assert groups is not None
        return round((groups[1] - groups[0]) * progress)
