"""The names of units, and which units and criteria go together. Needs no torch, so that recipes are checked at once."""

from collections.abc import Collection

from distill_llm.common.errors import InputError, one_of
from distill_llm.pruning.criteria import CRITERIA, is_comparable, ranks_layers_only
from distill_llm.pruning.units.kind import UnitKind
from distill_llm.pruning.units.kinds import KINDS

UNITS = tuple(KINDS)
"""The package's own kinds of units."""


def find_unit(name: str, field: str = "units") -> UnitKind:
    """The kind of unit of this name.

    Raises:
        InputError: there is none; the message suggests the nearest name.
    """
    if name not in KINDS:
        raise InputError(field, name, one_of(KINDS, name))
    return KINDS[name]


def unscored_faults(units: Collection[str], criterion: str, layer_criterion: str | None = None) -> list[InputError]:
    """A fault where the criterion scores some kinds of units only, and others are to be removed."""
    own = CRITERIA[criterion].units if criterion in CRITERIA else frozenset()
    missing = [unit for unit in units if own and KINDS[unit].scored not in own]
    missing = [unit for unit in missing if unit != "layers" or layer_criterion is None]
    if not missing:
        return []
    alone = missing == ["layers"] and len(units) > 1
    fix = f"remove {' and '.join(missing)}: {criterion} scores {' and '.join(sorted(own))}"
    return [InputError("units", list(units), fix=fix + (", or set layer_criterion, too" if alone else ""))]


def competing_faults(
    units: Collection[str], criterion: str, scope: str, uniform: bool, layer_criterion: str | None = None
) -> list[InputError]:
    """A fault for every setting that keeps these units from competing, where they can only be removed by competing.

    The attention or FFN of a layer beside other units, and queries beside heads or channels, have no share of their own that
    each kind or each layer could keep: their scores must compare, and over all layers.
    """
    blocks = " and ".join(name for name, kind in KINDS.items() if kind.block and name in units)
    if blocks not in ("", "layers") and len(units) > 1 and not ranks_layers_only(criterion):
        where = f"if units has {blocks} together with others"
    elif "queries" in units and {"heads", "hidden"} & set(units):
        where = "if units has queries together with heads or hidden"
    else:
        return []
    faults = []
    if not is_comparable(criterion):
        *others, last = (name for name in CRITERIA if is_comparable(name) and not unscored_faults(units, name))
        comparable = f"{', '.join(others)} or {last}" if others else last
        faults.append(InputError("criterion", criterion, fix=f"set it to {comparable} {where}"))
    if layer_criterion is not None:
        faults.append(InputError("layer_criterion", layer_criterion, fix=f"leave it out {where}"))
    if scope != "global":
        faults.append(InputError("scope", scope, fix=f"set it to global {where}"))
    if uniform:
        faults.append(InputError("uniform", uniform, fix=f"set it to false {where}"))
    return faults
