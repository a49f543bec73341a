"""The names of units and criteria, and which of them go together. Needs no torch, so that recipes are checked at once."""

from collections.abc import Collection
from typing import Literal, get_args

from distill_llm.common.errors import InputError

Unit = Literal["heads", "queries", "neurons", "layers", "attention", "ffn", "hidden"]
UNITS: tuple[Unit, ...] = get_args(Unit)
BLOCKS: tuple[Unit, ...] = ("layers", "attention", "ffn")

Criterion = Literal[
    "random",
    "magnitude",
    "magnitude_l1",
    "taylor",
    "fisher",
    "activation",
    "wanda",
    "block_influence",
    "leave_one_out",
]
CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
COMPARABLE: tuple[Criterion, ...] = ("fisher",)
"""Criteria whose scores of different kinds of units may be ranked together: all are in the same unit, squared loss."""
NEEDS_GRADIENTS: tuple[Criterion, ...] = ("taylor", "fisher")
RANKS_LAYERS: tuple[Criterion, ...] = ("block_influence", "leave_one_out")


def competing_faults(
    units: Collection[str], criterion: str, scope: str, uniform: bool, layer_criterion: str | None = None
) -> list[InputError]:
    """A fault for every setting that keeps these units from competing, where they can only be removed by competing.

    The attention or FFN of a layer beside other units, and queries beside heads or channels, have no share of their own that
    each kind or each layer could keep: their scores must compare, and over all layers.
    """
    blocks = " and ".join(name for name in BLOCKS if name in units)
    if blocks not in ("", "layers") and len(units) > 1 and criterion not in RANKS_LAYERS:
        where = f"where units has {blocks} together with others"
    elif "queries" in units and {"heads", "hidden"} & set(units):
        where = "where units has queries together with heads or hidden"
    else:
        return []
    faults = []
    if criterion not in COMPARABLE:
        faults.append(InputError("criterion", criterion, f"{' or '.join(COMPARABLE)} {where}"))
    if layer_criterion is not None:
        faults.append(InputError("layer_criterion", layer_criterion, f"nothing {where}"))
    if scope != "global":
        faults.append(InputError("scope", scope, f"global {where}"))
    if uniform:
        faults.append(InputError("uniform", uniform, f"false {where}"))
    return faults
