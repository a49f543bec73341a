"""Models whose layers have fewer heads, neurons and channels, and the code that cuts them.

Needs only torch, transformers and the files in CODE_NAMES. `save_pretrained` of a pruned model puts copies of them into the
checkpoint, so `AutoModelFor...from_pretrained(folder, trust_remote_code=True)` works where distill_llm is not installed.

A pruned model is built as its original was; then `shrink` cuts it to what `pruning` in its config keeps (see `lineage.py`). So
whatever depends on a layer's place (its attention window, its scale, its norms) stays as it was in the original, and new weights
are initialised as the original's. The config says the model's own sizes, as far as one number says them for all layers.

Public names: `shrink`, `pruned_class`, `stock_class`, and a class for every head of every family, made on first use:
`PrunedBertModel`, `PrunedLlamaForCausalLM`, ...
"""

import copy
import inspect
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from .configuration_pruned import STOCK_PREFIX, pruned_config_class, stock_config_of
from .families import Dims, dims_of, family_of, is_in_file, layers_of
from .family import Family
from .lineage import LAYER_UNITS, Counts, LayerPlan, ModelPlan, lineage_of

CODE_NAMES = (
    "modeling_pruned.py",
    "configuration_pruned.py",
    "families.py",
    "family.py",
    "lineage.py",
    "prototypes.py",
)
# What attention modules and configs call their own sizes.
_QUERIES = ("num_attention_heads", "num_heads", "n_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_WIDTHS = ("all_head_size", "split_size")


# The axes of parameters, and which entries along them a selection of units keeps.


def inputs_of(module: nn.Module) -> int:
    """Input channels of a linear."""
    weight: Any = module.weight
    return weight.shape[0 if isinstance(module, Conv1D) else 1]


def outputs_of(module: nn.Module) -> int:
    """Output channels of a linear."""
    weight: Any = module.weight
    return weight.shape[1 if isinstance(module, Conv1D) else 0]


def layer_counts(layer: nn.Module, family: Family, dims: Dims) -> dict[str, int]:
    """The number of units of every kind in a layer, pruned or not, from the sizes of the modules that the family's row names."""
    channels = {layout: inputs_of(layer.get_submodule(path)) for path, layout in family.readers}
    modules = dict(layer.named_modules())
    for path, layout in (*family.attention_in.items(), *family.ffn_in.items()):
        parts = layout.strip("()").split()
        new = [part for part in parts if part.isalpha() and part not in channels]
        if new and path in modules:
            known = sum(channels.get(part, 0) for part in parts)
            channels[new[0]] = (outputs_of(modules[path]) - known) // len(new)
    return {
        kind: channels.get(unit.letter, 0) // (dims.head_size if unit.by_head else 1)
        for kind, unit in LAYER_UNITS.items()
    }


def _spread(indices: Sequence[int], size: int) -> torch.Tensor:
    """The channels of these heads (or units), each `size` wide."""
    # On the CPU explicitly: models are built in a context whose default device is meta.
    heads = torch.tensor(indices, dtype=torch.long, device="cpu")
    return (heads[:, None] * size + torch.arange(size, device="cpu")).flatten()


def kept_channels(layout: str, row: LayerPlan, counts: Counts, head_size: int) -> torch.Tensor:
    """Which channels of a dimension with this `layout` stay, in a layer with `counts` units that keeps those of `row`."""
    if layout.startswith("("):
        shared, rows, queries = counts["queries"] // counts["heads"], [], row.indices("queries", counts)
        for group in row.heads:
            start = group * (shared + 2)
            rows += [start + query % shared for query in queries if query // shared == group]
            rows += [start + shared, start + shared + 1]
        return _spread(rows, head_size)
    kinds = {unit.letter: kind for kind, unit in LAYER_UNITS.items()}
    found, offset = [], 0
    for part in layout.split():
        kind = kinds[part.rstrip("/[]")]
        size = head_size if LAYER_UNITS[kind].by_head and part.isalpha() else 1
        found.append(_spread(row.indices(kind, counts), size) + offset)
        offset += counts[kind] * size
    return torch.cat(found)


def layer_axes(layer: nn.Module, family: Family) -> dict[str, tuple[int, str]]:
    """For each parameter of a layer along which heads or neurons lie: the dimension and its layout. Also for module lists."""
    axes: dict[str, tuple[int, str]] = {}
    modules = dict(layer.named_modules())
    for path, layout in (*family.attention_in.items(), *family.ffn_in.items()):
        if path not in modules or layout.endswith("[]"):
            axes |= {path: (0, layout)} if path in modules else {}
            continue
        for name, _ in modules[path].named_parameters(recurse=False):
            axes[f"{path}.{name}"] = (int(name == "weight" and isinstance(modules[path], Conv1D)), layout)
    for path, layout in family.readers:
        axes[f"{path}.weight"] = (int(not isinstance(modules[path], Conv1D)), layout)
    return axes


def hidden_dims(model: PreTrainedModel, sources: Sequence[int] | None = None) -> dict[str, tuple[int, ...]]:
    """For each parameter, the dimensions along which the channels of the residual stream lie.

    Args:
        sources: for each layer, its index in the original; None: as the config says.
    """
    if sources is None:
        lineage = lineage_of(model)
        sources = [row.source for row in lineage.layers] if lineage else []
    axes, prefix, found = _hidden_axes(model), layer_prefix(model), {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = name
        if sources and name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(".")
            original = f"{prefix}{sources[int(index)]}.{rest}"
        if original in axes:
            found[name] = axes[original]
            if (
                parameter.dim() == 2 and not parameter.numel()
            ):  # an EmptyLinear: one dimension has no entries, so the channels are the other
                found[name] = (int(not len(parameter)),)
    return found


def _hidden_axes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """For each parameter, by its name in the original, the dimensions along which the channels of the residual stream lie.

    The original is built twice without memory, the second time with twice the width and twice the heads. The dimensions that
    double are those of channels, except dimensions along which heads or neurons lie.
    """
    family = family_of(model)
    with stock_config_of(model.config):
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
    """The config with a residual stream `factor` times as wide and `factor` times the heads, so that a head keeps its size."""
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
    """The prefix of the names of the layers' parameters, e.g. "bert.encoder.layer."."""
    layers = layers_of(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


# Cutting.


class NoHeads(nn.Module):
    """An attention module without heads: it adds only the bias of its output linear.

    Holds the output linear (H outputs, 0 inputs) if the family keeps it inside the attention module. Tells a KV cache the number
    of tokens, so that the caches of all layers agree on it.
    """

    def __init__(self, layer_idx: int | None, adds_residual: bool, out_name: str = "", out: nn.Module | None = None):
        super().__init__()
        self.layer_idx, self.adds_residual, self.out_name = layer_idx, adds_residual, out_name
        if out is not None:
            self.add_module(out_name, out)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        cache = kwargs.get("past_key_values", kwargs.get("layer_past"))
        if cache is not None and self.layer_idx is not None:
            nothing = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(nothing, nothing, self.layer_idx)
        context = hidden_states[..., :0]
        output = self.get_submodule(self.out_name)(context) if self.out_name else context
        return (output + args[0] if self.adds_residual else output), None


class EmptyLinear(nn.Linear):
    """A linear without inputs or without outputs, in place of an `nn.Linear` or a Conv1D.

    bitsandbytes cannot quantize a weight without entries. It replaces every Conv1D, and every module whose class is exactly
    `nn.Linear`; it leaves this subclass alone.
    """


class LayerConfig:
    """A model's config for one layer: some values are the layer's own, all others come from the model's config."""

    def __init__(self, config: Any, own: Mapping[str, Any]):
        self.__dict__.update(shared=config, own=dict(own))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "shared" not in self.__dict__:
            raise AttributeError(name)
        return self.own[name] if name in self.own else getattr(self.shared, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.shared, name, value)


def shrink(model: PreTrainedModel, plan: ModelPlan, *, lineage: ModelPlan) -> None:
    """Cut `model`, in place, to what a plan keeps.

    Args:
        plan: what stays, in indices of `model` as it is now.
        lineage: the same in indices of the original teacher.
    """
    family, dims = family_of(model), dims_of(model.config)
    parent, _, name = layer_prefix(model).rstrip(".").rpartition(".")
    layers = layers_of(model)
    kept = nn.ModuleList(layers[row.source] for row in plan.layers)
    setattr(model.get_submodule(parent), name, kept)
    for index, (layer, row, source) in enumerate(zip(kept, plan.layers, lineage.layers, strict=True)):
        counts = layer_counts(layer, family, dims)
        for name, (dim, layout) in layer_axes(layer, family).items():
            _cut(layer, name, dim, kept_channels(layout, row, counts, dims.head_size))
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", index)  # noqa: B010
        _resize_attention(layer, family, dims, row.counts(counts), source)
    _keep_places(model)
    if plan.hidden is not None:
        sources = [row.source for row in lineage.layers]
        _cut_hidden(model, torch.tensor(plan.hidden, device="cpu"), sources)


def _keep_places(model: PreTrainedModel) -> None:
    """Have the model that runs the layers, which may be inside another (OPT's decoder), line up the attentions it returns."""
    path, family = layer_prefix(model).rstrip("."), family_of(model)
    models = [name for name, each in model.named_modules() if isinstance(each, PreTrainedModel)]
    inner = max((name for name in models if not name or path.startswith(f"{name}.")), key=len)
    owner = model.get_submodule(inner)
    hooks = owner._forward_hooks
    # By name: a model loaded with trust_remote_code has other classes, from the checkpoint's copy of this file.
    for key in [key for key, hook in hooks.items() if type(hook).__name__ == "LinesUpAttentions"]:
        del hooks[key]
    there = tuple(type(layer.get_submodule(family.attention)).__name__ != "NoHeads" for layer in layers_of(model))
    if not all(there):
        owner.register_forward_hook(LinesUpAttentions(there))


@dataclass(frozen=True)
class LinesUpAttentions:
    """A hook that puts None where a layer has no attention: transformers leaves such layers out of what it returns.

    Attributes:
        there: which layers have one.
    """

    there: tuple[bool, ...]

    def __call__(self, model: nn.Module, args: tuple, output: Any) -> Any:
        """The output of the model, its attentions in their places."""
        if isinstance(output, tuple):  # return_dict=False: the attentions are the tuple of tensors of four dimensions
            return tuple(self._lined_up(each) for each in output)
        if getattr(output, "attentions", None) is not None:
            output.attentions = self._lined_up(output.attentions)
        return output

    def _lined_up(self, found: Any) -> Any:
        if not isinstance(found, tuple) or len(found) != sum(self.there):
            return found
        if any(not isinstance(each, torch.Tensor) or each.dim() != 4 for each in found):
            return found
        rest = iter(found)
        return tuple(next(rest) if here else None for here in self.there)


def _cut(root: nn.Module, name: str, dim: int, kept: torch.Tensor) -> None:
    """Cut a parameter, or a module list, to its `kept` entries along a dimension."""
    path, _, last = name.rpartition(".")
    found: Any = root.get_submodule(path)
    old = getattr(found, last)
    if isinstance(old, nn.ModuleList):
        setattr(found, last, nn.ModuleList(old[i] for i in kept.tolist()))
        return
    if len(kept) == old.shape[dim]:
        return
    new = old.detach().index_select(dim, kept.to(old.device))
    setattr(found, last, nn.Parameter(new, requires_grad=old.requires_grad))
    _note_sizes(found)


def _note_sizes(module: Any) -> None:
    """Update the sizes that a module records of its own weight."""
    if isinstance(module, nn.Linear | Conv1D) and not module.weight.numel():
        if isinstance(module, Conv1D):
            module.weight = nn.Parameter(module.weight.detach().T, requires_grad=module.weight.requires_grad)
        module.__class__ = EmptyLinear
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, Conv1D):
        module.nx, module.nf = module.weight.shape
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]


def _cut_hidden(model: PreTrainedModel, kept: torch.Tensor, sources: Sequence[int]) -> None:
    axes, cut = hidden_dims(model, sources), {}
    for name, old in list(model.named_parameters(remove_duplicate=False)):
        path, _, last = name.rpartition(".")
        if id(old) not in cut:
            for dim in axes.get(name, ()):
                _cut(model, name, dim, kept)
            cut[id(old)] = model.get_parameter(name)
        module = model.get_submodule(path)
        setattr(module, last, cut[id(old)])  # tied weights stay tied
        _note_sizes(module)


def _resize_attention(layer: nn.Module, family: Family, dims: Dims, counts: Counts, source: LayerPlan) -> None:
    """Update the sizes that an attention module records of itself; without heads, replace the module.

    Args:
        counts: number of units that the layer has now.
        source: the same units in indices of the original teacher.
    """
    attention: Any = layer.get_submodule(family.attention)
    if not counts["heads"]:
        inside, _, name = family.attention_out.rpartition(".")
        own = (name, attention.get_submodule(name)) if inside == family.attention else ()
        path, _, name = family.attention.rpartition(".")
        empty = NoHeads(getattr(attention, "layer_idx", None), family.adds_residual, *own)
        setattr(layer.get_submodule(path), name, empty)
        return
    queries, groups = counts["queries"], counts["heads"]
    sizes = dict.fromkeys(_QUERIES, queries) | dict.fromkeys(_GROUPS, groups)
    sizes |= {"num_key_value_groups": queries // groups}
    sizes |= dict.fromkeys((*_WIDTHS, *family.attention_widths), queries * dims.head_size)
    for name, size in sizes.items():
        if hasattr(attention, name):
            setattr(attention, name, size)
    if family.reads_config:
        shared = getattr(attention.config, "shared", attention.config)
        attention.config = LayerConfig(shared, {"num_attention_heads": queries, "num_key_value_heads": groups})
    kept_heads = source.indices("queries", {"heads": dims.groups, "queries": dims.queries})
    if family.per_head_inputs and len(kept_heads) < dims.queries:
        if not hasattr(attention, "kept_heads"):
            attention.register_forward_pre_hook(_select_heads, with_kwargs=True)
        attention.kept_heads, attention.all_heads = kept_heads, dims.queries
        attention.per_head_inputs = family.per_head_inputs


def _select_heads(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Give attention only its kept heads' part of inputs that were made for all heads of the original."""
    names = [*inspect.signature(type(module).forward).parameters][1 : 1 + len(args)]
    given = dict(zip(names, args, strict=True)) | kwargs
    for name in module.per_head_inputs:
        value = given.get(name)
        if value is None:
            continue
        kept = torch.tensor(module.kept_heads, device=value.device)
        if value.dim() == 4 and value.shape[1] == module.all_heads:
            given[name] = value[:, kept]
        elif value.dim() == 3:
            given[name] = value.unflatten(0, (-1, module.all_heads))[:, kept].flatten(0, 1)
    return tuple(given.pop(name) for name in names), given


# Classes.


class PrunedModel:
    """Mixed into a stock class by `pruned_class`: builds the original model, then cuts it as its config says."""

    config: PreTrainedConfig

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        lineage = lineage_of(config)
        if lineage is None:
            raise ValueError(f"config: {type(self).__name__} needs that of a pruned model: this one has no `pruning`")
        if (layers := len(lineage.layers)) != config.num_hidden_layers:
            given = config.num_hidden_layers
            raise ValueError(f"num_hidden_layers: got {given}; leave it out: this pruned model has {layers} layers")
        with stock_config_of(config):
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        # Weights are on the meta device if they are about to be loaded; otherwise they were initialised, and stay so.
        shrink(self, lineage, lineage=lineage)  # type: ignore[arg-type]

    @classmethod
    def is_custom_code(cls) -> bool:
        """False: transformers initialises the modules of custom code in another way, and these are its own modules."""
        return False

    def _auto_map(self) -> dict[str, str]:
        """Where the code beside the weights has the config's class and those of all heads."""
        own = type(self).__name__.removeprefix(STOCK_PREFIX)
        return {"AutoConfig": f"configuration_pruned.{type(self.config).__name__}"} | {
            auto: f"modeling_pruned.{STOCK_PREFIX}{name}" for auto, name in _auto_classes(self.config.model_type, own)
        }

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As `PreTrainedModel.save_pretrained`, but also copies the code, so that stock transformers can load the folder."""
        self.config.__class__ = pruned_config_class(type(self.config))
        self.config.auto_map = self._auto_map()
        if is_main_process:
            if not is_in_file(self.config.model_type):
                line = (
                    "%s: the row of family %r was added by a script, and the code beside the weights does not have it. "
                )
                line += "To load it elsewhere, add the row to families.py there and in distill_llm/architectures"
                logging.getLogger(__name__).warning(line, save_directory, self.config.model_type)
            copy_code(save_directory, CODE_NAMES)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)  # type: ignore[misc]

    def _get_files_timestamps(self, working_dir: str | os.PathLike) -> dict[str, float]:
        # save_pretrained(push_to_hub=True) uploads only new files. Leaving ours out here makes them new every time.
        stamps = super()._get_files_timestamps(working_dir)  # type: ignore[misc]
        return {name: stamp for name, stamp in stamps.items() if name not in CODE_NAMES}


def copy_code(folder: str | os.PathLike, names: Sequence[str]) -> None:
    """Copy files of this package that a checkpoint needs beside its weights into its folder."""
    os.makedirs(folder, exist_ok=True)
    for name in names:
        source, target = os.path.join(os.path.dirname(__file__), name), os.path.join(folder, name)
        if not os.path.exists(target) or not os.path.samefile(source, target):
            shutil.copyfile(source, target)


def _auto_classes(model_type: str, own: str) -> list[tuple[str, str]]:
    """(auto class, stock class) for every head of a family. The class being saved comes before others of its auto class."""
    mappings: dict[str, Any] = {
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForMaskedLM": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "AutoModelForImageClassification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
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
    """The class for pruned models with the head of `stock`: PrunedBertForMaskedLM for BertForMaskedLM."""
    if issubclass(stock, PrunedModel):
        return stock
    name = STOCK_PREFIX + stock.__name__
    if name not in _classes:
        assert stock.config_class is not None
        own: dict[str, Any] = {"__module__": __name__, "__doc__": PrunedModel.__doc__}
        own["config_class"] = pruned_config_class(stock.config_class)
        _classes[name] = type(name, (PrunedModel, stock), own)
    return _classes[name]


def stock_class(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The transformers class that a pruned class is made from; any other class is returned as it is."""
    # By name: a model loaded with trust_remote_code has another PrunedModel, from the checkpoint's copy of this file.
    line = model_class.__mro__
    ours = [index for index, each in enumerate(line) if each.__name__ == "PrunedModel"]
    return line[ours[0] + 1] if ours else model_class


def __getattr__(name: str) -> type[PreTrainedModel]:
    stock = getattr(transformers, name.removeprefix(STOCK_PREFIX), None) if name.startswith(STOCK_PREFIX) else None
    if stock is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned_class(stock)
