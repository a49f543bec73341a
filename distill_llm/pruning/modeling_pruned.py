"""Pruned transformers: one row per family, and the models whose layers keep fewer heads, neurons and channels.

This file needs torch and transformers only. `save_pretrained` of a pruned model puts a copy of it into the checkpoint, so
`AutoModelFor...from_pretrained(folder, trust_remote_code=True)` works where distill_llm is not installed.

A pruned model's `config.pruning` holds `layers`, a row per layer: `source`, the layer of the original teacher it comes from,
and the kept `heads` (KV groups where queries share keys), `neurons` and, where some of a kept group's are gone, `queries`,
as ranges of the original teacher's indices ("0,3-5"); `hidden`, the kept channels of the residual stream, where some are
gone; and `stock`, the original's sizes. The config's own sizes are the original's too, but for the number and kinds of
layers. A pruned model is built as the original was, then `shrink` leaves what these rows keep: whatever depends on a layer's place (its attention window, its scale, its
norms) stays as it was in the original.

Public names: `Family`, `FAMILIES`, `family_of`, `layers_of`, `dims_of`, `LayerLineage`, `lineage_of`, `shrink`,
`pruned_class`, `stock_class`, and, made when asked for, `PrunedBertModel`, `PrunedLlamaForCausalLM`, ... for every head of
every family.
"""

import copy
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Family:
    """Where a family keeps the parts that pruning touches. Paths are relative: `layers` to the base model, the rest to a layer.

    `attention` is the module that computes attention; what `attention_in` names feeds it, its outputs enter `attention_out`.
    `ffn_in` feeds `ffn_out`. The values of `attention_in` and `ffn_in` say how a module's outputs are laid out:

    - "q", "kv", "n": the channels of all query heads, of all key-value heads, the neurons;
    - "q kv kv": one after the other;
    - "(q kv kv)": group by group, each its queries, then its key, then its value;
    - "q/", "kv/": a row per head, not per channel; "q[]", "kv[]": a list of modules, one per head.

    `ffn_config` is the config's name for the FFN width, `hidden_fields` its names for the width of the residual stream,
    `attention_widths` the attention module's own names for its width. `per_head_inputs` names what the model hands to every
    attention for all the original's heads (position biases). `reads_config`: attention takes its head count from the config.
    `adds_residual`: attention adds its second argument to its output. `mlm_head` is the first module of the masked-LM head.
    """

    layers: str = "layers"
    attention: str = "self_attn"
    attention_in: Mapping[str, str] = field(default_factory=dict)
    attention_out: str = "self_attn.o_proj"
    ffn_in: Mapping[str, str] = field(default_factory=dict)
    ffn_out: str = "mlp.down_proj"
    ffn_config: str = "intermediate_size"
    hidden_fields: tuple[str, ...] = ("hidden_size",)
    attention_widths: tuple[str, ...] = ()
    per_head_inputs: tuple[str, ...] = ()
    reads_config: bool = False
    adds_residual: bool = False
    mlm_head: str = "cls"


def _projections(names: str, prefix: str = "self_attn.", **more: str) -> dict[str, str]:
    """Layouts of separate query, key and value modules: "q_proj k_proj v_proj", with `more` ones by their path's dots as __."""
    layouts = dict(zip((prefix + name for name in names.split()), ("q", "kv", "kv"), strict=True))
    return layouts | {prefix + path.replace("__", "."): layout for path, layout in more.items()}


_BERT = Family(
    layers="encoder.layer",
    attention="attention.self",
    attention_in=_projections("query key value", "attention.self."),
    attention_out="attention.output.dense",
    ffn_in={"intermediate.dense": "n"},
    ffn_out="output.dense",
)
_ROBERTA = replace(_BERT, mlm_head="lm_head")
_LLAMA = Family(
    attention_in=_projections("q_proj k_proj v_proj"), ffn_in={"mlp.gate_proj": "n", "mlp.up_proj": "n"}
)
_NEOX_FFN = {"ffn_in": {"mlp.dense_h_to_4h": "n"}, "ffn_out": "mlp.dense_4h_to_h"}

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "ernie": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": replace(_BERT, mlm_head="generator_predictions"),
    "distilbert": Family(
        layers="transformer.layer",
        attention="attention",
        attention_in=_projections("q_lin k_lin v_lin", "attention."),
        attention_out="attention.out_lin",
        ffn_in={"ffn.lin1": "n"},
        ffn_out="ffn.lin2",
        ffn_config="hidden_dim",
        attention_widths=("dim",),
        mlm_head="vocab_transform",
    ),
    # The model makes one position bias for all heads and hands it to every layer.
    "mpnet": replace(
        _BERT,
        attention="attention.attn",
        attention_in=_projections("q k v", "attention.attn."),
        attention_out="attention.attn.o",
        per_head_inputs=("position_bias",),
        mlm_head="lm_head",
    ),
    # Relative positions have projections of their own; without share_att_key only.
    "deberta-v2": replace(
        _BERT,
        attention_in=_projections(
            "query_proj key_proj value_proj", "attention.self.", pos_key_proj="q", pos_query_proj="q"
        ),
        hidden_fields=("hidden_size", "pooler_hidden_size", "embedding_size"),
    ),
    "modernbert": Family(
        attention="attn",
        attention_in={"attn.Wqkv": "q kv kv"},
        attention_out="attn.Wo",
        ffn_in={"mlp.Wi": "n n"},
        ffn_out="mlp.Wo",
        mlm_head="head",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "smollm3": _LLAMA,
    "granite": _LLAMA,
    # Norms of queries and keys span all heads, have a row or a module per head; those of Qwen3 and Gemma3 serve every head.
    "olmo2": replace(_LLAMA, attention_in=_projections("q_proj k_proj v_proj", q_norm="q", k_norm="kv")),
    "cohere": replace(_LLAMA, attention_in=_projections("q_proj k_proj v_proj", q_norm="q/", k_norm="kv/")),
    "stablelm": replace(
        _LLAMA,
        attention_in=_projections("q_proj k_proj v_proj", q_layernorm__norms="q[]", k_layernorm__norms="kv[]"),
    ),
    "starcoder2": replace(_LLAMA, ffn_in={"mlp.c_fc": "n"}, ffn_out="mlp.c_proj"),
    "phi": replace(_LLAMA, attention_out="self_attn.dense", ffn_in={"mlp.fc1": "n"}, ffn_out="mlp.fc2"),
    "phi3": replace(
        _LLAMA,
        attention_in={"self_attn.qkv_proj": "q kv kv"},
        ffn_in={"mlp.gate_up_proj": "n n"},
        reads_config=True,
    ),
    "opt": replace(
        _LLAMA,
        layers="decoder.layers",
        attention_out="self_attn.out_proj",
        ffn_in={"fc1": "n"},
        ffn_out="fc2",
        ffn_config="ffn_dim",
        hidden_fields=("hidden_size", "word_embed_proj_dim"),
        attention_widths=("embed_dim",),
    ),
    "gpt2": Family(
        layers="h",
        attention="attn",
        attention_in={"attn.c_attn": "q kv kv"},
        attention_out="attn.c_proj",
        ffn_in={"mlp.c_fc": "n"},
        ffn_out="mlp.c_proj",
        ffn_config="n_inner",
        attention_widths=("embed_dim",),
    ),
    "gpt_neox": Family(
        attention="attention",
        attention_in={"attention.query_key_value": "(q kv kv)"},
        attention_out="attention.dense",
        **_NEOX_FFN,  # type: ignore[arg-type]
    ),
    "bloom": Family(
        layers="h",
        attention="self_attention",
        attention_in={"self_attention.query_key_value": "(q kv kv)"},
        attention_out="self_attention.dense",
        ffn_config="",  # always four times the hidden size
        per_head_inputs=("alibi",),
        adds_residual=True,
        **_NEOX_FFN,  # type: ignore[arg-type]
    ),
    "falcon": Family(
        layers="h",
        attention="self_attention",
        attention_in={"self_attention.query_key_value": "(q kv kv)"},
        attention_out="self_attention.dense",
        ffn_config="ffn_hidden_size",
        per_head_inputs=("alibi", "attention_mask"),
        **_NEOX_FFN,  # type: ignore[arg-type]
    ),
}

STOCK_PREFIX = "Pruned"
CODE_NAME = "modeling_pruned.py"
# What attention modules call their own sizes.
_QUERIES = ("num_attention_heads", "num_heads", "n_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("all_head_size", "split_size")


class Dims(NamedTuple):
    """Sizes of the original model's attention: channels of a head, query heads, key-value heads (groups)."""

    head_size: int
    queries: int
    groups: int


class LayerLineage(NamedTuple):
    """From which layer of the original teacher a student's layer was made, and its heads (groups), neurons and queries.

    `queries` is None where every query of the kept groups stays.
    """

    source: int
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    queries: tuple[int, ...] | None = None


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
    row = FAMILIES[config.model_type]
    if config.model_type == "falcon" and config.multi_query and not config.new_decoder_architecture:
        row = replace(row, attention_in={"self_attention.query_key_value": "q kv kv"})
    return row


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


def width_of(model: PreTrainedModel | PreTrainedConfig) -> int:
    """Channels of the residual stream of any model, pruned or not."""
    config = model if isinstance(model, PreTrainedConfig) else model.config
    kept = hidden_lineage(config)
    return config.get_text_config().hidden_size if kept is None else len(kept)


def dims_of(config: PreTrainedConfig) -> Dims:
    """Attention sizes of the original model, whatever was pruned since."""
    with stock_values(config):
        queries = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // queries
        groups = getattr(config, "num_key_value_heads", None) or queries
        if config.model_type == "falcon":
            groups = config.num_kv_heads if config.new_decoder_architecture else 1 if config.multi_query else queries
        return Dims(head_size, queries, groups)


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
        LayerLineage(
            row["source"],
            unpack_indices(row["heads"]),
            unpack_indices(row["neurons"]),
            unpack_indices(row["queries"]) if "queries" in row else None,
        )
        for row in record["layers"]
    )


def hidden_lineage(config: PreTrainedConfig) -> tuple[int, ...] | None:
    """The channels of the original's residual stream that a pruned model keeps; None: all."""
    kept = (getattr(config, "pruning", None) or {}).get("hidden")
    return None if kept is None else unpack_indices(kept)


@contextmanager
def stock_values(config: PreTrainedConfig) -> Iterator[None]:
    """Within the context a pruned model's config says what its original's config said."""
    stock = (getattr(config, "pruning", None) or {}).get("stock", {})
    own = {name: getattr(config, name) for name in stock}
    for name, value in stock.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(config, name, value)


# The axes of a layer's parameters, and what a selection of units keeps along them.


class Sizes(NamedTuple):
    """Query heads, key-value heads (groups) and neurons of a layer as it is now."""

    queries: int
    groups: int
    neurons: int


def inputs_of(module: nn.Module) -> int:
    """Input channels of a linear."""
    return module.weight.shape[0 if isinstance(module, Conv1D) else 1]  # type: ignore[union-attr, index, return-value]


def outputs_of(module: nn.Module) -> int:
    """Output channels of a linear."""
    return module.weight.shape[1 if isinstance(module, Conv1D) else 0]  # type: ignore[union-attr, index, return-value]


def layer_sizes(layer: nn.Module, family: Family, dims: Dims) -> Sizes:
    """Sizes of a layer, pruned or not."""
    queries = inputs_of(layer.get_submodule(family.attention_out)) // dims.head_size
    neurons = inputs_of(layer.get_submodule(family.ffn_out))
    if not queries:
        return Sizes(0, 0, neurons)
    path, layout = next((p, one) for p, one in family.attention_in.items() if "kv" in one)
    rows = outputs_of(layer.get_submodule(path)) // dims.head_size
    return Sizes(queries, rows if layout == "kv" else (rows - queries) // 2, neurons)


def all_queries(heads: Sequence[int], sizes: Sizes) -> tuple[int, ...]:
    """The query heads of these groups."""
    shared = sizes.queries // sizes.groups if sizes.groups else 0
    return tuple(group * shared + i for group in heads for i in range(shared))


def _spread(indices: Sequence[int], size: int) -> torch.Tensor:
    """Heads to their channels."""
    # On the processor by name: models are loaded inside a context that makes tensors without memory.
    heads = torch.tensor(indices, dtype=torch.long, device="cpu")
    return (heads[:, None] * size + torch.arange(size, device="cpu")).flatten()


def kept_channels(layout: str, row: LayerLineage, sizes: Sizes, head_size: int) -> torch.Tensor:
    """Which channels of a dimension laid out as `layout` stay in a layer of `sizes` that keeps `row`'s units."""
    queries = all_queries(row.heads, sizes) if row.queries is None else row.queries
    parts = {"q": (queries, sizes.queries), "kv": (row.heads, sizes.groups), "n": (row.neurons, sizes.neurons)}
    if layout.startswith("("):
        shared = sizes.queries // sizes.groups
        heads: list[int] = []
        for group in row.heads:
            start = group * (shared + 2)
            heads += [start + query - group * shared for query in queries if query // shared == group]
            heads += [start + shared, start + shared + 1]
        return _spread(heads, head_size)
    found, offset = [], 0
    for part in layout.split():
        indices, count = parts[part.rstrip("/[]")]
        size = 1 if part.endswith(("/", "[]")) or part == "n" else head_size
        found.append(_spread(indices, size) + offset)
        offset += count * size
    return torch.cat(found)


def layer_axes(layer: nn.Module, family: Family) -> dict[str, tuple[int, str]]:
    """Per parameter of a layer that heads or neurons span: the dimension, and how it is laid out. Paths of module lists too."""
    axes: dict[str, tuple[int, str]] = {}
    modules = dict(layer.named_modules())
    for path, layout in (*family.attention_in.items(), *family.ffn_in.items()):
        if path not in modules or layout.endswith("[]"):
            axes |= {path: (0, layout)} if path in modules else {}
            continue
        for name, _ in modules[path].named_parameters(recurse=False):
            axes[f"{path}.{name}"] = (int(name == "weight" and isinstance(modules[path], Conv1D)), layout)
    for path, layout in ((family.attention_out, "q"), (family.ffn_out, "n")):
        axes[f"{path}.weight"] = (int(not isinstance(modules[path], Conv1D)), layout)
    return axes


def hidden_axes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Per parameter, by its name in the original, the dimensions that the residual stream's channels span.

    Found by building the original twice without memory, once with twice the width and twice the heads: what doubles with it,
    but for what heads and neurons span.
    """
    family = family_of(model)
    with stock_values(model.config):
        configs = [_widened(model.config, family, factor) for factor in (1, 2)]
    width = configs[0].hidden_size
    small, large = (_without_memory(stock_class(type(model)), config) for config in configs)
    prefix, layouts = layer_prefix(small), layer_axes(layers_of(small)[0], family)
    grown = dict(large.named_parameters(remove_duplicate=False))
    axes: dict[str, tuple[int, ...]] = {}
    for name, parameter in small.named_parameters(remove_duplicate=False):
        inner = name.removeprefix(prefix).partition(".")[2] if name.startswith(prefix) else ""
        own = layouts.get(inner, (None, ""))[0]
        sizes = enumerate(zip(parameter.shape, grown[name].shape, strict=True))
        if dims := tuple(dim for dim, pair in sizes if pair == (width, 2 * width) and dim != own):
            axes[name] = dims
    return axes


def _widened(config: PreTrainedConfig, family: Family, factor: int) -> PreTrainedConfig:
    """The config of a residual stream `factor` times as wide, with as many times the heads, whose size then stays."""
    wide, width = copy.deepcopy(config), config.hidden_size
    for name in (*family.hidden_fields, "num_attention_heads", *_GROUPS):
        size = getattr(wide, name, None)
        if size is not None and (size == width or name not in family.hidden_fields):
            setattr(wide, name, size * factor)
    if hasattr(wide, "pruning"):
        del wide.pruning
    return wide


def _without_memory(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return model_class._from_config(config)


def layer_prefix(model: PreTrainedModel) -> str:
    """What the names of the layers' parameters begin with, e.g. "bert.encoder.layer."."""
    layers = layers_of(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


# Cutting.


class NoHeads(nn.Module):
    """An attention module with no head left: it adds nothing but the bias of its output linear.

    Holds the output linear (H outputs, 0 inputs) where the family keeps it inside the attention module. A KV cache is told
    how many tokens there were, so that the layers' caches stay in line.
    """

    def __init__(self, out_name: str | None, out: nn.Module | None, layer_idx: int | None, adds_residual: bool):
        super().__init__()
        self.out_name, self.layer_idx, self.adds_residual = out_name, layer_idx, adds_residual
        if out_name is not None:
            self.add_module(out_name, out)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None and self.layer_idx is not None:
            nothing = hidden_states.new_zeros(len(hidden_states), 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        context = hidden_states[..., :0]
        output = context if self.out_name is None else self.get_submodule(self.out_name)(context)
        return (output + args[0] if self.adds_residual else output), None


class EmptyConv1D(Conv1D):
    """A Conv1D with no input left: its bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class LayerConfig:
    """A model's config as one layer sees it: some values are the layer's own, all others are read from the model's."""

    def __init__(self, config: PreTrainedConfig, own: Mapping[str, Any]):
        self.__dict__.update(shared=config, own=dict(own))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "shared" not in self.__dict__:
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def shrink(
    model: PreTrainedModel,
    rows: Sequence[LayerLineage],
    hidden: Sequence[int] | None,
    *,
    original: Sequence[LayerLineage],
    values: bool,
) -> None:
    """Leave in `model` only the layers, heads, neurons and channels that are named.

    Args:
        rows: what stays, a row per remaining layer, in indices of `model` as it is.
        hidden: channels of the residual stream that stay; None: all.
        original: the same rows in indices of the original teacher.
        values: take the kept values along; without, new weights are not initialised (they are about to be loaded).
    """
    family, dims = family_of(model), dims_of(model.config)
    prefix, layers = layer_prefix(model), layers_of(model)
    if hidden is not None:
        _cut_hidden(model, torch.tensor(hidden, device="cpu"), values)
    kept = nn.ModuleList(layers[row.source] for row in rows)
    for index, (layer, row, source) in enumerate(zip(kept, rows, original, strict=True)):
        sizes = layer_sizes(layer, family, dims)
        for name, (dim, layout) in layer_axes(layer, family).items():
            if sizes.queries or "q" not in layout and "kv" not in layout:
                _cut(layer, name, dim, kept_channels(layout, row, sizes, dims.head_size), values)
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index
        _resize_attention(model, layer, row, source, sizes)
    parent, _, name = prefix.rstrip(".").rpartition(".")
    setattr(model.get_submodule(parent), name, kept)


def _cut(root: nn.Module, name: str, dim: int, kept: torch.Tensor, values: bool) -> None:
    """Leave the `kept` entries along a dimension of a parameter, or of a module list."""
    found: Any = root
    path = name.split(".")
    for part in path[:-1]:
        found = getattr(found, part)
    old = getattr(found, path[-1])
    if isinstance(old, nn.ModuleList):
        setattr(found, path[-1], nn.ModuleList(old[i] for i in kept.tolist()))
        found.num_heads = len(kept)
        return
    if len(kept) == old.shape[dim]:
        return
    shape = (*old.shape[:dim], len(kept), *old.shape[dim + 1 :])
    new = old.detach().index_select(dim, kept.to(old.device)) if values else old.detach().new_empty(shape)
    setattr(found, path[-1], nn.Parameter(new, requires_grad=old.requires_grad))
    if isinstance(found, nn.Linear):
        found.out_features, found.in_features = found.weight.shape
    elif isinstance(found, Conv1D):
        found.nx, found.nf = found.weight.shape
        if not found.nx:  # its forward cannot reshape what has no entries
            found.__class__ = EmptyConv1D
    elif isinstance(found, nn.LayerNorm):
        found.normalized_shape = tuple(found.weight.shape)
    elif isinstance(found, nn.Embedding):
        found.embedding_dim = found.weight.shape[1]


def _cut_hidden(model: PreTrainedModel, kept: torch.Tensor, values: bool) -> None:
    prefix, layers = layer_prefix(model), layers_of(model)
    sources = lineage_of(model) if values else None  # of a model that was pruned before, whose layers have moved
    axes = hidden_axes(model)
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    place = {str(index): str(row.source) for index, row in enumerate(sources or ())}
    assert names[id(layers)] + "." == prefix
    tied: dict[int, nn.Parameter] = {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        own = name
        if place and name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            own = f"{prefix}{place[index]}.{rest}"
        parent, _, last = name.rpartition(".")
        if id(old) in tied:
            setattr(model.get_submodule(parent), last, tied[id(old)])
            continue
        for dim in axes.get(own, ()):
            _cut(model, name, dim, kept, values)
        tied[id(old)] = model.get_parameter(name)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


def _resize_attention(
    model: PreTrainedModel, layer: nn.Module, row: LayerLineage, source: LayerLineage, before: Sizes
) -> None:
    """Bring the attention module's own records of its size up to date."""
    family, dims = family_of(model), dims_of(model.config)
    attention = layer.get_submodule(family.attention)
    queries = len(all_queries(row.heads, before) if row.queries is None else row.queries)
    groups, width = len(row.heads), queries * dims.head_size
    if isinstance(attention, NoHeads):
        return
    if not groups:
        inside, _, name = family.attention_out.rpartition(".")
        own = (name, attention.get_submodule(name)) if inside == family.attention else (None, None)
        parent, _, name = family.attention.rpartition(".")
        empty = NoHeads(*own, getattr(attention, "layer_idx", None), family.adds_residual)
        setattr(layer.get_submodule(parent), name, empty)
        return
    sizes = dict.fromkeys(_QUERIES, queries) | dict.fromkeys(_GROUPS, groups)
    sizes |= {"num_key_value_groups": queries // groups} | dict.fromkeys((*_WIDTHS, *family.attention_widths), width)
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if family.reads_config:
        shared = attention.config.shared if isinstance(attention.config, LayerConfig) else attention.config
        attention.config = LayerConfig(shared, {"num_attention_heads": queries, "num_key_value_heads": groups})
    if family.per_head_inputs:
        kept_heads = source.queries or all_queries(source.heads, Sizes(dims.queries, dims.groups, 0))
        if len(kept_heads) == dims.queries:
            return
        if not hasattr(attention, "kept_heads"):
            attention.register_forward_pre_hook(_select_heads, with_kwargs=True)
        attention.kept_heads = kept_heads
        attention.per_head_inputs, attention.all_heads = family.per_head_inputs, dims.queries


def _select_heads(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Of inputs made for all heads of the original, hand attention those of the heads it kept."""
    names = [*type(module).forward.__code__.co_varnames[1 : 1 + len(args)]]
    given = dict(zip(names, args, strict=True)) | kwargs
    for name in module.per_head_inputs:
        value, every = given.get(name), module.all_heads
        if value is None or every == len(module.kept_heads):
            continue
        kept = torch.tensor(module.kept_heads, device=value.device)
        if value.dim() == 4 and value.shape[1] == every:
            given[name] = value[:, kept]
        elif value.dim() == 3:
            given[name] = value.unflatten(0, (-1, every))[:, kept].flatten(0, 1)
    return tuple(given.pop(name) for name in names), given


class PrunedModel:
    """Mixed into a stock class by `pruned_class`: builds the original model, then shrinks it as its config says."""

    config: PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        with stock_values(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        lineage = lineage_of(config)
        assert lineage is not None
        hidden = hidden_lineage(config)
        shrink(self, lineage, hidden, original=lineage, values=False)  # type: ignore[arg-type]
        if hidden is not None:
            self.tie_weights()  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`; the folder also gets this file, so that stock transformers can load it."""
        own = type(self).__name__.removeprefix(STOCK_PREFIX)
        self.config.auto_map = {
            auto: f"modeling_pruned.{STOCK_PREFIX}{name}" for auto, name in _auto_classes(self.config.model_type, own)
        }
        if is_main_process:
            os.makedirs(save_directory, exist_ok=True)
            target = os.path.join(save_directory, CODE_NAME)
            if not os.path.exists(target) or not os.path.samefile(__file__, target):
                shutil.copyfile(__file__, target)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        # What was there before is not uploaded by save_pretrained(push_to_hub=True): our file is always new.
        stamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: stamp for name, stamp in stamps.items() if name != CODE_NAME}


def _auto_classes(model_type: str, own: str) -> list[tuple[str, str]]:
    """(auto class, stock class) of every head of a family; the class being saved wins its own auto class."""
    mappings: dict[str, Any] = {
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
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
