"""The config of a pruned model, and whether the family's own config can describe it, so that it is a stock model."""

import copy
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill_llm.architectures.configuration_pruned import stock_config_class
from distill_llm.architectures.families import dims_of, family_of
from distill_llm.architectures.lineage import Counts, ModelPlan, packed, stock_values
from distill_llm.pruning.units.sizes import counts_of, hidden_size

# Config fields with a value for each layer.
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
# Attributes of modules that only record a size. All other attributes must agree with those of the stock model.
_NOTES = {
    "hidden_size",
    "intermediate_size",
    "embed_dim",
    "dim",
    "split_size",
    "all_head_size",
    "embedding_dim",
    "n_layers",
}

_MODES = {"training", "gradient_checkpointing"}
# What configs and models raise when they refuse sizes.
_REFUSALS = (ValueError, AttributeError, TypeError, StrictDataclassError)


class NotStock(ValueError):
    """No stock config can describe the model; the message is the reason, in one line."""


def stock_record(config: PreTrainedConfig) -> dict[str, Any]:
    """The values in the original's config that pruning may change."""
    record = (getattr(config, "pruning", None) or {}).get("stock")
    if record is not None:
        return record
    family, said = family_of(config), config.to_dict()
    names = ["num_hidden_layers", *family.hidden_fields, "num_attention_heads", "num_key_value_heads", "num_kv_heads"]
    record = {name: getattr(config, name) for name in (*names, family.ffn_config) if name and hasattr(config, name)}
    # Some configs compute these instead of saving them: then there is nothing to record.
    kept = ("head_dim", *_PER_LAYER)
    return record | {name: said[name] for name in kept if said.get(name) is not None}


def write_lineage(config: PreTrainedConfig, stock: dict[str, Any], lineage: ModelPlan) -> None:
    """Write a lineage into a config, with the sizes of the model that it is of.

    Sizes that differ from layer to layer, or that no layer has, stay those of the original.
    """
    for name, value in stock.items():
        if isinstance(value, list):
            value = [value[row.source] for row in lineage.layers]
        setattr(config, name, value)
    config.num_hidden_layers = len(lineage.layers)
    config.pruning = packed(lineage, stock)
    family, dims = family_of(config), dims_of(config)
    original = {"heads": dims.groups, "queries": dims.queries}
    kinds = ("heads", "queries", "neurons")  # of which configs have fields
    found = {kind: {len(row.indices(kind, original)) for row in lineage.layers} for kind in kinds}
    counts = {kind: min(sizes) for kind, sizes in found.items() if len(sizes) == 1 and 0 not in sizes}
    width = None if lineage.hidden is None or family.keeps_width else len(lineage.hidden)
    for name, value in _sizes(config, counts, width).items():
        if not isinstance(getattr(type(config), name, None), property):  # Falcon's: see `pruned_config_class`
            setattr(config, name, value)


def _sizes(config: PreTrainedConfig, counts: Counts, width: int | None) -> dict[str, Any]:
    """The fields of a config, which says the original's sizes, for these units in every layer and this width; None: as it is.

    Kinds of units that `counts` leaves out stay as they are.
    """
    family, dims, stock_width = family_of(config), dims_of(config), stock_record(config)["hidden_size"]
    queries, groups = counts.get("queries"), counts.get("heads")
    said: dict[str, Any] = {}
    if queries is not None and groups is not None:
        said |= {"num_attention_heads": queries, "num_key_value_heads": groups, "num_kv_heads": groups}
    if width is not None:
        said |= {name: width for name in family.hidden_fields if getattr(config, name, None) == stock_width}
    if (queries or dims.queries, width or stock_width) != (dims.queries, stock_width):
        said["head_dim"] = dims.head_size
    if family.ffn_config and "neurons" in counts:
        said[family.ffn_config] = counts["neurons"]
    return {name: value for name, value in said.items() if hasattr(config, name) or name == "head_dim"}


def stock_config(config: PreTrainedConfig, counts: Counts, width: int) -> PreTrainedConfig:
    """A plain config of the same family for a model in which every layer has `counts` units and the stream `width` channels.

    Raises:
        NotStock: the config refuses these sizes.
    """
    own = copy.deepcopy(config)
    own.__class__ = stock_config_class(type(config))
    with stock_values(config):
        said = _sizes(config, counts, width)
    try:
        for name, value in said.items():
            setattr(own, name, value)
        type(own).from_dict(own.to_dict())  # which checks the sizes, as loading does
    except _REFUSALS as error:
        raise NotStock(f"{type(own).__name__} refuses its sizes: {_reason(error)}") from error
    return own


def stock_accepts(config: PreTrainedConfig, queries: int, groups: int, width: int) -> bool:
    """Whether the family's own config accepts these numbers of heads in every layer and of channels of the residual stream.

    Args:
        config: of the model to prune, which may itself be pruned already.
    """
    with stock_values(config):
        neurons = getattr(config, family_of(config).ffn_config, None)
        try:
            stock_config(config, {"heads": groups, "neurons": neurons, "queries": queries}, width)  # type: ignore[dict-item]
        except NotStock:
            return False
    return True


def become_stock(student: PreTrainedModel, base: type[PreTrainedModel]) -> None:
    """Turn a freshly pruned student into a plain transformers model of class `base`.

    Raises:
        NotStock: no stock config can describe it.
    """
    config, stock = stock_twin(student, base)
    others = dict(stock.named_modules())
    for name, module in student.named_modules():
        for note in _NOTES & vars(module).keys() & vars(others[name]).keys():
            setattr(module, note, getattr(others[name], note))
    student.config.__dict__.update(config.__dict__)
    student.config.__class__ = type(config)
    student.__class__ = base


def stock_twin(student: PreTrainedModel, base: type[PreTrainedModel]) -> tuple[PreTrainedConfig, PreTrainedModel]:
    """The stock config that describes a student, and the model of class `base` built from it, on the meta device.

    Raises:
        NotStock: no stock config can describe it.
    """
    counts = counts_of(student)
    if any(each != counts[0] for each in counts):
        raise NotStock("its layers keep different numbers of heads or neurons")
    if 0 in counts[0].values():
        raise NotStock("its layers have no attention or no FFN left")
    config = stock_config(student.config, counts[0], hidden_size(student))
    try:
        with torch.device("meta"):
            stock = base._from_config(copy.deepcopy(config))
    except _REFUSALS as error:
        raise NotStock(f"{base.__name__} refuses its sizes: {_reason(error)}") from error
    if difference := _difference(student, stock):
        raise NotStock(f"{type(config).__name__} cannot say what it is: {difference}")
    return config, stock


def _reason(error: Exception) -> str:
    """The last line of an error's text: what was wrong, after what was checked."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
    return line.removeprefix("ValueError: ")[:200]


def _difference(student: nn.Module, stock: nn.Module) -> str | None:
    """The first difference between two models in modules, sizes or settings, or None. Weights and recorded sizes may differ."""
    mine, theirs = dict(student.named_modules()), dict(stock.named_modules())
    if odd := min(mine.keys() ^ theirs.keys(), default=None):
        return f"it would have {'no ' if odd in mine else ''}{odd}"
    for name, module in mine.items():
        other = theirs[name]
        if name and type(module) is not type(other):
            return f"{name} would be {type(other).__name__}, is {type(module).__name__}"
        for found, wanted in ((_shapes(module), _shapes(other)), (_settings(module), _settings(other))):
            for key in sorted(found.keys() | wanted.keys()):
                if found.get(key) != wanted.get(key):
                    path = f"{name}.{key}".lstrip(".")
                    return f"{path} would be {_shown(wanted.get(key))}, is {_shown(found.get(key))}"
    return None


def _shown(value: Any) -> str:
    return str(list(value)) if isinstance(value, torch.Size) else str(value)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return {name: tensor.shape for name, tensor in own}


def _settings(module: nn.Module) -> dict[str, Any]:
    plain = (bool, int, float, str, tuple)
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and not name.startswith("_") and name not in _NOTES | _MODES
    }
