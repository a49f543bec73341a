"""Between statistics and a criterion: what it did not declare is not handed out, and what it returns is checked."""

from collections.abc import Mapping
from typing import Any

import torch

from distill_llm.common.errors import InputError
from distill_llm.pruning.criteria import Criterion, Need
from distill_llm.pruning.statistics.record import UnitStatistics

NEEDED: dict[str, Need] = {
    "taylor": "gradients",
    "fisher": "gradients",
    "activation": "activations",
    "wanda": "activations",
    "fluctuation": "activations",
    "weight_taylor": "weight_gradients",
    "refit": "refit",
    "removal": "refit",
    "similarity": "activations",
    "without": "leave_one_out",
}
"""What the statistics must hold for a field to be more than zeros; fields that are not here need no data."""


class Declared:
    """Statistics as a criterion sees them: a field that its `needs` do not cover is an error, since it may hold zeros.

    Args:
        of: `Statistics` or `UnitStatistics`.
        criterion: the one that reads them.
    """

    def __init__(self, of: Any, criterion: Criterion):
        self._of, self._criterion = of, criterion

    def __getattr__(self, name: str) -> Any:
        """The field of this name.

        Raises:
            InputError: the criterion did not declare what the field needs.
        """
        need, declared = NEEDED.get(name), self._criterion.needs
        # A pass with a loss, or without layers in turn, is over calibration data.
        if need is not None and need not in declared and not (need == "activations" and declared):
            fix = f"declare needs=[{need!r}] in its decorator: it reads {name}"
            raise InputError("criterion", self._criterion.name, fix=fix)
        return self._shown(getattr(self._of, name))

    def _shown(self, found: Any) -> Any:
        if isinstance(found, UnitStatistics):
            return Declared(found, self._criterion)
        if isinstance(found, tuple):
            return tuple(map(self._shown, found))
        if isinstance(found, Mapping):
            return {kind: self._shown(rows) for kind, rows in found.items()}
        return found


def checked_scores(found: Any, units: int, criterion: str, kind: str) -> torch.Tensor:
    """What a criterion returned for so many units of a kind, once it is a finite number for each.

    Raises:
        InputError: it is anything else; by such scores any units would be removed.
    """
    wrong = ""
    if not isinstance(found, torch.Tensor):
        wrong = f"a {type(found).__name__}"
    elif found.shape != (units,):
        wrong = f"a tensor of shape {tuple(found.shape)}"
    elif unsound := int((~found.isfinite()).sum()):
        wrong = f"nan or infinity for {unsound} of them"
    if wrong:
        fix = f"return a tensor of {units} finite scores for the {units} {kind}: it returned {wrong}"
        raise InputError("criterion", criterion, fix=fix)
    return found  # type: ignore[no-any-return]
