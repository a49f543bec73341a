"""Which fields of a recipe's pruning section go together."""

from typing import TYPE_CHECKING, Any

from distill_llm.common.errors import InputError
from distill_llm.pruning.criteria import ranks_layers_only
from distill_llm.pruning.names import BLOCKS, competing_faults

if TYPE_CHECKING:
    from distill_llm.recipe.sections import PruningSection


def pruning_faults(section: "PruningSection") -> list[InputError]:
    """A fault for every field that contradicts another, named within the section."""
    units: set[str] = set(section.units)
    faults = _explicit_layers(section) if section.layers is not None else []
    if section.keep is None and section.layers is None:
        faults.append(InputError("keep", None, "a number above 0 and at most 1 (or a list of layers in `layers`)"))
    if len(units) != len(section.units):
        faults.append(InputError("units", section.units, "each unit at most once"))
    if ranks_layers_only(section.criterion) and section.units != ["layers"]:
        accepted = f"[layers] with criterion {section.criterion} (beside other units: `layer_criterion`)"
        faults.append(InputError("units", section.units, accepted))
    if section.layer_criterion is not None and ("layers" not in units or units == {"layers"}):
        accepted = "nothing where units does not have layers beside others"
        faults.append(InputError("layer_criterion", section.layer_criterion, accepted))
    reads_loss = section.reads_loss or section.statistics is not None
    if section.loss is not None and not reads_loss:
        named = " and ".join(sorted(section.criteria))
        faults.append(InputError("loss", section.loss, f"nothing with criterion {named}, which reads no loss"))
    for name, default, wanted in (
        ("round_to", 1, ("neurons", "hidden")),
        ("uniform", False, ("heads", "neurons", "queries")),
        ("min_heads", 0, ("heads", "attention")),
        ("min_neurons", 0, ("neurons", "ffn")),
    ):
        value = getattr(section, name)
        if value != default and not units & set(wanted):
            accepted = f"{_yaml(default)} where units has none of {', '.join(wanted)}"
            faults.append(InputError(name, value, accepted))
    if section.moment_layers is not None and not section.folds:
        accepted = "nothing without compensation of heads, neurons or channels"
        faults.append(InputError("moment_layers", section.moment_layers, accepted))
    if section.offload and not section.checkpointing:
        faults.append(InputError("checkpointing", False, "true with offload"))
    if section.offload and section.cost == "latency":
        faults.append(
            InputError("cost", "latency", "params, flops or memory with offload: latency is measured on the device")
        )
    if section.scope == "local" and not units & {"heads", "neurons", "queries", *BLOCKS}:
        faults.append(InputError("scope", "local", "global where units is [hidden]: all layers share their channels"))
    return faults + competing_faults(units, section.criterion, section.scope, section.uniform, section.layer_criterion)


def _explicit_layers(section: "PruningSection") -> list[InputError]:
    faults, layers = [], section.layers or []
    if section.keep is not None:
        faults.append(InputError("keep", section.keep, "nothing where `layers` says what to keep"))
    for name in ("rounds", "cuts"):
        if getattr(section, name) > 1:
            faults.append(InputError(name, getattr(section, name), "1 where `layers` says what to keep"))
    if section.statistics is not None:
        faults.append(InputError("statistics", str(section.statistics), "nothing where `layers` says what to keep"))
    if section.cost == "latency":
        faults.append(InputError("cost", "latency", "params, flops or memory where `layers` says what to keep"))
    if min(layers) < 0 or sorted(set(layers)) != layers:
        faults.append(InputError("layers", layers, "distinct indices of layers, counted from 0, ascending"))
    return faults


def _yaml(value: Any) -> str:
    return str(value).lower()
