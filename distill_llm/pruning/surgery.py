"""Removing what a plan removes: a new, really smaller model."""

import copy

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from distill_llm.errors import InputError
from distill_llm.pruning.modeling_pruned import (
    LayerLineage,
    family_of,
    layers_of,
    lineage_of,
    pruned_class,
    set_lineage,
    stock_class,
)
from distill_llm.pruning.moments import compensate_linear
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.statistics import Statistics
from distill_llm.pruning.structure import head_size_of, layer_shapes, linear


def compose_lineage(model: PreTrainedModel, plan: PruningPlan) -> tuple[LayerLineage, ...]:
    """The lineage of the model that `plan` makes of `model`: indices into the original teacher, over all rounds so far."""
    before = lineage_of(model) or tuple(
        LayerLineage(i, tuple(range(s.heads)), tuple(range(s.neurons))) for i, s in enumerate(layer_shapes(model))
    )
    return tuple(
        LayerLineage(
            before[row.source].source,
            tuple(before[row.source].heads[i] for i in row.heads),
            tuple(before[row.source].neurons[i] for i in row.neurons),
        )
        for row in plan.layers
    )


def stock_expressible(config: PreTrainedConfig, lineage: tuple[LayerLineage, ...]) -> bool:
    """Whether a stock config can say these sizes: every head of every layer, and one FFN width for all.

    These families derive the head size from the head count, so a stock config cannot say fewer heads.
    """
    widths = {len(row.neurons) for row in lineage}
    return all(len(row.heads) == config.num_attention_heads for row in lineage) and len(widths) == 1 and 0 not in widths


def prune(model: PreTrainedModel, plan: PruningPlan, compensate: Statistics | None = None) -> PreTrainedModel:
    """A new model with only what the plan keeps; the input is untouched.

    The result is a plain transformers class where the stock config can say its sizes, else a `Pruned...` class that saves
    the code to load it beside its weights. Its config holds the lineage.

    Args:
        compensate: statistics of this very model with second moments; fold what is removed into what stays (see
            `compensate_linear`).

    Raises:
        InputError: if the plan does not fit the model, or the statistics have no moments or other sizes.
    """
    plan.check(model)
    family, lineage = family_of(model), compose_lineage(model, plan)
    config = copy.deepcopy(model.config)
    set_lineage(config, lineage)
    base = stock_class(type(model))
    stock = stock_expressible(config, lineage)
    if stock:
        setattr(config, family.ffn_config, len(lineage[0].neurons))
        if hasattr(config, "auto_map"):
            del config.auto_map
    student_class = base if stock else pruned_class(base)
    # Attention implementation is not part of the copied config's public fields; hand it on.
    student = student_class._from_config(
        config, dtype=model.dtype, attn_implementation=getattr(model.config, "_attn_implementation", None)
    )
    layer_prefix = _layer_prefix(model)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith(layer_prefix)}
    for index, row in enumerate(plan.layers):
        for name, tensor in _layer_weights(model, row, compensate).items():
            weights[f"{layer_prefix}{index}.{name}"] = tensor
    student.load_state_dict(weights, strict=True)
    if getattr(model, "generation_config", None) is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    return student.to(model.device).train(model.training)


def _layer_prefix(model: PreTrainedModel) -> str:
    layers = layers_of(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."


def _layer_weights(model: PreTrainedModel, row: LayerPlan, compensate: Statistics | None) -> dict[str, torch.Tensor]:
    """The weights of one layer with only the plan's heads and neurons."""
    family, head_size, layer = family_of(model), head_size_of(model), layers_of(model)[row.source]
    weights = dict(layer.state_dict())
    heads = torch.tensor(row.heads, dtype=torch.long)
    channels = (heads[:, None] * head_size + torch.arange(head_size)).flatten()
    neurons = torch.tensor(row.neurons, dtype=torch.long)
    inputs = ((family.query, family.key, family.value), family.ffn_in)
    for kind, (out, kept) in enumerate(((family.attention_out, channels), (family.ffn_out, neurons))):
        module = linear(layer, out)
        kept_here = kept.to(module.weight.device)
        if compensate is None:
            weights[f"{out}.weight"] = module.weight.detach()[:, kept_here]
        else:
            moments = _moments(compensate, row.source, kind, module.in_features)
            weights[f"{out}.weight"], bias = compensate_linear(module.weight, module.bias, moments, kept)
            if bias is not None:
                weights[f"{out}.bias"] = bias
        for path in inputs[kind]:
            for part in ("weight", "bias"):
                name = f"{path}.{part}"
                if name in weights and kind == 0 and not len(kept):
                    del weights[name]  # no heads: the module has no query, key and value
                elif name in weights:
                    weights[name] = weights[name][kept_here]
    return weights


def _moments(statistics: Statistics, layer: int, kind: int, width: int):
    if not statistics.moments:
        raise InputError("compensate", "statistics without moments", "statistics collected with moments=True")
    if layer >= len(statistics.moments) or len(statistics.moments[layer][kind].mean) != width:
        raise InputError("compensate", "statistics of a model of other sizes", "statistics of the model that is pruned")
    return statistics.moments[layer][kind]
