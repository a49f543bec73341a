"""Pruned transformers: one row per family, and the models whose layers keep fewer heads and neurons.

This file needs torch and transformers only. `save_pretrained` of a pruned model puts a copy of it into the checkpoint, so
`AutoModelFor...from_pretrained(folder, trust_remote_code=True)` works where distill_llm is not installed.

A pruned model's `config.pruning` holds a row per layer: `source`, the layer of the original teacher it comes from, and the
kept `heads` and `neurons` as ranges of the original teacher's indices ("0,3-5"). The sizes of the layer are the lengths.

Public names: `Family`, `FAMILIES`, `family_of`, `layers_of`, `LayerLineage`, `lineage_of`, `set_lineage`, `shrink`,
`pruned_class`, and, made when asked for, `PrunedBertModel`, `PrunedBertForSequenceClassification`, ... for every head of
every family.
"""

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto


@dataclass(frozen=True)
class Family:
    """Where a family keeps the parts that pruning touches. Paths are relative: `layers` to the base model, the rest to a layer.

    `attention` is the module that computes attention from `query`, `key` and `value`; its outputs enter `attention_out`.
    `ffn_in` (one linear, or two where the FFN is gated) feeds `ffn_out`. `heads_attribute` and `width_attribute` are the
    attention module's own records of its size. `ffn_config` is the config's name for the FFN width.
    `mlm_head` names the module of the masked-LM model that first receives the hidden states.
    """

    layers: str = "encoder.layer"
    attention: str = "attention.self"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    attention_out: str = "attention.output.dense"
    ffn_in: tuple[str, ...] = ("intermediate.dense",)
    ffn_out: str = "output.dense"
    heads_attribute: str = "num_attention_heads"
    width_attribute: str | None = "all_head_size"
    ffn_config: str = "intermediate_size"
    mlm_head: str = "cls"


FAMILIES: dict[str, Family] = {
    "bert": Family(),
    "roberta": Family(mlm_head="lm_head"),
    "xlm-roberta": Family(mlm_head="lm_head"),
    "camembert": Family(mlm_head="lm_head"),
    "electra": Family(mlm_head="generator_predictions"),
    "distilbert": Family(
        layers="transformer.layer",
        attention="attention",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        ffn_in=("ffn.lin1",),
        ffn_out="ffn.lin2",
        heads_attribute="n_heads",
        width_attribute="dim",
        ffn_config="hidden_dim",
        mlm_head="vocab_transform",
    ),
}

STOCK_PREFIX = "Pruned"


class LayerLineage(NamedTuple):
    """From which layer, heads and neurons of the original teacher a student's layer was made."""

    source: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]


def family_of(model: PreTrainedModel | PreTrainedConfig) -> Family:
    """The family row of a model or config.

    Raises:
        ValueError: one line, if the family has no row.
    """
    config = model if isinstance(model, PreTrainedConfig) else model.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model: got family {config.model_type!r}; accepted: one of {', '.join(FAMILIES)}. To add a family, add a row "
            "with the names of its modules to FAMILIES in distill_llm/pruning/modeling_pruned.py, and its name to the tests"
        )
    return FAMILIES[config.model_type]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The transformer layers of any model: by its family's row, else the module list as long as the config says."""
    base = model.base_model
    if model.config.model_type in FAMILIES:
        layers = base.get_submodule(FAMILIES[model.config.model_type].layers)
        assert isinstance(layers, nn.ModuleList)
        return layers
    count = model.config.get_text_config().num_hidden_layers
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"model: found no list of {count} layers in {type(model).__name__}")


def pack_indices(indices: Iterable[int]) -> str:
    """Ascending indices as ranges: (0, 3, 4, 5) -> "0,3-5"."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and index == ranges[-1][1] + 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


def unpack_indices(text: str) -> tuple[int, ...]:
    """The reverse of `pack_indices`."""
    indices: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        indices.extend(range(int(first), int(last or first) + 1))
    return tuple(indices)


def lineage_of(model: PreTrainedModel | PreTrainedConfig) -> tuple[LayerLineage, ...] | None:
    """A row per layer of a pruned model; None for a model that was never pruned."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    record = getattr(config, "pruning", None)
    if record is None:
        return None
    return tuple(
        LayerLineage(row["source"], unpack_indices(row["heads"]), unpack_indices(row["neurons"]))
        for row in record["layers"]
    )


def set_lineage(config: PreTrainedConfig, layers: Iterable[LayerLineage]) -> None:
    """Write the lineage, and the number of layers, into a config."""
    rows = [
        {"source": row.source, "heads": pack_indices(row.heads), "neurons": pack_indices(row.neurons)} for row in layers
    ]
    config.pruning = {"layers": rows}
    config.num_hidden_layers = len(rows)


class NoHeads(nn.Module):
    """An attention module with no head left: it adds nothing but the bias of its output linear.

    Holds the output linear (H outputs, 0 inputs) where the family keeps it inside the attention module.
    """

    def __init__(self, out_name: str | None, out: nn.Module | None):
        super().__init__()
        self.out_name = out_name
        if out_name is not None:
            self.add_module(out_name, out)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        context = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
        return (context if self.out_name is None else self.get_submodule(self.out_name)(context)), None


def _resize(layer: nn.Module, path: str, inputs: int | None = None, outputs: int | None = None) -> None:
    old = layer.get_submodule(path)
    assert isinstance(old, nn.Linear), f"{path} is {type(old).__name__}"
    inputs, outputs = old.in_features if inputs is None else inputs, old.out_features if outputs is None else outputs
    if (inputs, outputs) == (old.in_features, old.out_features):
        return
    parent, _, name = path.rpartition(".")
    new = torch.nn.utils.skip_init(
        nn.Linear, inputs, outputs, bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype
    )
    setattr(layer.get_submodule(parent), name, new)


def shrink(model: PreTrainedModel, head_size: int) -> None:
    """Give every layer of a stock-shaped model the sizes that `model.config.pruning` says. New weights are not initialised.

    Args:
        head_size: channels per head.
    """
    family, lineage = family_of(model), lineage_of(model)
    assert lineage is not None
    for layer, row in zip(layers_of(model), lineage, strict=True):
        width = len(row.heads) * head_size
        for path in (family.query, family.key, family.value):
            _resize(layer, path, outputs=width)
        _resize(layer, family.attention_out, inputs=width)
        for path in family.ffn_in:
            _resize(layer, path, outputs=len(row.neurons))
        _resize(layer, family.ffn_out, inputs=len(row.neurons))
        attention = layer.get_submodule(family.attention)
        setattr(attention, family.heads_attribute, len(row.heads))
        if family.width_attribute is not None:
            setattr(attention, family.width_attribute, width)
        if width == 0:
            inside, _, name = family.attention_out.rpartition(".")
            own = (name, attention.get_submodule(name)) if inside == family.attention else (None, None)
            parent, _, name = family.attention.rpartition(".")
            setattr(layer.get_submodule(parent), name, NoHeads(*own))


class PrunedModel:
    """Mixed into a stock class by `pruned_class`: builds the stock model, then shrinks its layers as its config says."""

    config: PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        shrink(self, config.hidden_size // config.num_attention_heads)  # type: ignore[arg-type]

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; the folder also gets this file, so that stock transformers can load it."""
        own = type(self).__name__.removeprefix(STOCK_PREFIX)
        self.config.auto_map = {
            auto: f"modeling_pruned.{STOCK_PREFIX}{name}" for auto, name in _auto_classes(self.config.model_type, own)
        }
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            target = os.path.join(save_directory, "modeling_pruned.py")
            if not os.path.exists(target) or not os.path.samefile(__file__, target):
                shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        # What was there before is not uploaded by save_pretrained(push_to_hub=True): our file is always new.
        stamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: stamp for name, stamp in stamps.items() if name != "modeling_pruned.py"}


def _auto_classes(model_type: str, own: str) -> list[tuple[str, str]]:
    """(auto class, stock class) of every head of a family; the class being saved wins its own auto class."""
    mappings: dict[str, Any] = {
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "AutoModelForMultipleChoice": modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
        "AutoModelForPreTraining": modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES,
    }
    found = []
    for auto, mapping in mappings.items():
        names = mapping.get(model_type, ())
        names = (names,) if isinstance(names, str) else names
        if names:
            found.append((auto, own if own in names else names[0]))
    return found


_classes: dict[str, type[PreTrainedModel]] = {}


def pruned_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of pruned models with the head of `stock`, e.g. PrunedBertForMaskedLM for BertForMaskedLM."""
    if issubclass(stock, PrunedModel):
        return stock
    name = STOCK_PREFIX + stock.__name__
    if name not in _classes:
        _classes[name] = type(name, (PrunedModel, stock), {"__module__": __name__, "__doc__": PrunedModel.__doc__})
    return _classes[name]


def stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The transformers class that a pruned class is made from; the class itself where it is not one of ours."""
    # By name: what was loaded with trust_remote_code has a PrunedModel of its own, from the checkpoint's copy of this file.
    line = model_class.__mro__
    ours = [index for index, each in enumerate(line) if each.__name__ == "PrunedModel"]
    return line[ours[0] + 1] if ours else model_class


def __getattr__(name: str) -> type[PreTrainedModel]:
    stock = getattr(transformers, name.removeprefix(STOCK_PREFIX), None) if name.startswith(STOCK_PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(stock)
