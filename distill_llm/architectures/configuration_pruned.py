"""Configs of pruned models: those of the family, saved under a `model_type` of their own.

A folder of a pruned model must never open as the family's own class: where shapes happen to agree, it would load and compute
something else. So config.json says `pruned_llama`, which transformers knows only through the code beside the weights. In memory
`model_type` stays `llama`, because transformers, PEFT and others choose by it what they do with a model.

Needs only torch, transformers and the files beside it: checkpoints of pruned models hold a copy of this file.

Public names: `pruned_config_class`, `stock_config_class`, `family_type`, and a class for every family, made on first use:
`PrunedBertConfig`, ...
"""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import transformers
from transformers import PreTrainedConfig

from .families import dims_of, row_of
from .lineage import lineage_of, stock_values

STOCK_PREFIX = "Pruned"
_TYPE_PREFIX = "pruned_"
# The name of the weights' file, for a class of the family itself: it reads this field, finds no such file and says so.
_NO_STOCK_WEIGHTS = (
    "this model is pruned: open it with AutoModelFor...from_pretrained(..., trust_remote_code=True), or with load_pretrained "
    "of distill_llm"
)


# How transformers says that layers differ, in config.json.
_BY_LAYER, _GLOBAL_TOO = "per_layer_config", "allow_global_per_layer_attribute_access"


class PrunedConfig:
    """Mixed into a family's config class by `pruned_config_class`.

    What transformers calls a heterogeneous config is made here from `pruning`, which says more. config.json carries it for
    programs that read only that; in memory, transformers would warn at each read of a size for all layers, which this class
    means: a model is built at the original's sizes.
    """

    model_type: str
    allow_global_per_layer_attribute_access = True
    serialize_explicit_per_layer_config = False

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `PreTrainedConfig.get_config_dict`, with the family's own `model_type`."""
        said, unused = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        for name in ("transformers_weights", _BY_LAYER, _GLOBAL_TOO):  # made anew when the config is saved
            said.pop(name, None)
        return said | {"model_type": cls.model_type}, unused

    def to_json_string(self, use_diff: bool = True) -> str:
        """As `PreTrainedConfig.to_json_string`, with the `model_type` that no stock class has."""
        said = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        said |= {"model_type": _TYPE_PREFIX + self.model_type, "transformers_weights": _NO_STOCK_WEIGHTS}
        if (sizes := layer_sizes(self)) and any(sizes):  # type: ignore[arg-type]
            digits = len(str(len(sizes) - 1))
            said[_BY_LAYER] = {str(index).zfill(digits): own for index, own in enumerate(sizes) if own}
            said[_GLOBAL_TOO] = True
        return json.dumps(said, indent=2, sort_keys=True) + "\n"

    @property
    def is_heterogeneous(self) -> bool:
        """Whether layers differ in a size that transformers has a name for."""
        return any(layer_sizes(self))  # type: ignore[arg-type]

    @property
    def per_layer_config(self) -> Sequence[Any]:
        """The config of each layer, of the family's own class."""
        found = []
        for own in layer_sizes(self) or [{}] * self.num_hidden_layers:  # type: ignore[arg-type, attr-defined]
            config: Any = copy.copy(self)
            config.__class__ = stock_config_class(type(self))  # type: ignore[arg-type]
            vars(config).pop("pruning", None)
            config.skip = own.get("skip", [])
            for name, value in own.items():
                setattr(config, name, value)
            found.append(config)
        return found

    @property
    def per_layer_attributes(self) -> set[str] | None:
        """The sizes in which layers differ; None where they do not."""
        names = {name for own in layer_sizes(self) for name in own if name != "skip"}  # type: ignore[arg-type]
        return names if self.is_heterogeneous else None

    def _update_heterogeneous_to_dict_output(self, d: dict[str, Any]) -> None:
        """Nothing: `pruning` says it, and a dict of this class is read by this class."""

    def validate(self) -> None:
        """Check the config as that of the original: a family may refuse the sizes of a pruned model."""
        with stock_values(self):  # type: ignore[arg-type]
            super().validate()  # type: ignore[misc]


def layer_sizes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """For each layer of a pruned model what its config's sizes are instead of those for all layers, under the family's names.

    A layer without attention or FFN has it in `skip`. Empty where the family's heads are not of a size that its config says:
    their number would change the size.
    """
    lineage, row = lineage_of(config), row_of(config)
    stated = not isinstance(getattr(stock_config_class(type(config)), "head_dim", property()), property)
    if lineage is None or row is None or not stated or not isinstance(config.head_dim, int):
        return []
    dims, found = dims_of(config), []
    for layer in lineage.layers:
        counts = layer.counts({"heads": dims.groups, "queries": dims.queries, "neurons": 0})
        sizes = {"num_attention_heads": counts["queries"], row.ffn_config: counts["neurons"]}
        if isinstance(row.groups, str):
            sizes[row.groups] = counts["heads"]
        own: dict[str, Any] = {
            name: size for name, size in sizes.items() if name and size and size != getattr(config, name, size)
        }
        skip = [part for part, kind in (("attention", "heads"), ("mlp", "neurons")) if not counts[kind]]
        found.append({**own, "skip": skip} if skip else own)
    return found


def family_type(model_type: str | None) -> str | None:
    """The family of a pruned model by the `model_type` in its config.json; None for any other model."""
    return model_type.removeprefix(_TYPE_PREFIX) if model_type and model_type.startswith(_TYPE_PREFIX) else None


_classes: dict[str, type[PreTrainedConfig]] = {}


def pruned_config_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The class for configs of pruned models of a family: PrunedBertConfig for BertConfig."""
    if config_class.__name__.startswith(STOCK_PREFIX):
        return config_class
    name = STOCK_PREFIX + config_class.__name__
    if name not in _classes:
        own: dict[str, Any] = {"__module__": __name__, "__doc__": PrunedConfig.__doc__}
        if isinstance(
            getattr(config_class, "head_dim", None), property
        ):  # it would follow from the sizes that are left
            own["head_dim"] = property(_head_size)
        _classes[name] = type(name, (PrunedConfig, config_class), own)
    return _classes[name]


def _head_size(config: PreTrainedConfig) -> int:
    """Channels per head, of a config whose family derives them: as they were in the original."""
    stock = (getattr(config, "pruning", None) or {}).get("stock", {})
    width, heads = (stock.get(name, getattr(config, name)) for name in ("hidden_size", "num_attention_heads"))
    return int(width) // int(heads)


def stock_config_class(config_class: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """The transformers class that a class of `pruned_config_class` is made from; any other class is returned as it is."""
    # By name: a model loaded with trust_remote_code has another PrunedConfig, from the checkpoint's copy of this file.
    line = config_class.__mro__
    ours = [index for index, each in enumerate(line) if each.__name__ == "PrunedConfig"]
    return line[ours[0] + 1] if ours else config_class


@contextmanager
def stock_config_of(config: PreTrainedConfig) -> Iterator[None]:
    """Within the context a pruned model's config is that of its original: of the family's class, with its sizes.

    Some heads make the model below them with `AutoModel.from_config`. It must be the family's own, still uncut, and not the
    class that the code beside the weights has for it.
    """
    own = type(config)
    with stock_values(config):
        config.__class__ = stock_config_class(own)
        try:
            yield
        finally:
            config.__class__ = own


def __getattr__(name: str) -> type[PreTrainedConfig]:
    stock = getattr(transformers, name.removeprefix(STOCK_PREFIX), None) if name.startswith(STOCK_PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_config_class(stock)
