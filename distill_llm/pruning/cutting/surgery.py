"""Removing what a plan removes: a new, really smaller model."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.configuration_pruned import pruned_config_class
from distill_llm.architectures.families import dims_of, family_of, layers_of
from distill_llm.architectures.lineage import LAYER_UNITS, ModelPlan, compose, lineage_of
from distill_llm.architectures.modeling_pruned import (
    kept_channels,
    layer_prefix,
    pruned_class,
    shrink,
    stock_class,
)
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.finite import check_weights
from distill_llm.models.exits import exits_to_prune
from distill_llm.models.placement import check_in_memory
from distill_llm.pruning.compensation.bypass import Bypasses
from distill_llm.pruning.compensation.channels import repaired_stream
from distill_llm.pruning.compensation.linear import compensate_linear
from distill_llm.pruning.cutting.stock import NotStock, become_stock, stock_record, stock_twin, write_lineage
from distill_llm.pruning.plan import PruningPlan, full_plan
from distill_llm.pruning.statistics.moments import RIDGE, Moments
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.units.sizes import counts_of, linear, weight_of


def lineage_after(model: PreTrainedModel, plan: PruningPlan) -> ModelPlan:
    """The lineage of the model that `plan` makes of `model`: indices into the original teacher, over all rounds so far."""
    dims = dims_of(model.config)
    original = {"heads": dims.groups, "queries": dims.queries}
    return compose(lineage_of(model) or full_plan(model), plan, lambda layer: original)


def prune(
    model: PreTrainedModel,
    plan: PruningPlan,
    compensate: Statistics | None = None,
    *,
    bypasses: Bypasses | None = None,
    ridge: float | None = RIDGE,
) -> PreTrainedModel:
    """A new model with only what the plan keeps; the input is untouched.

    The result is a plain transformers class where the stock config can say its sizes, else a `Pruned...` class that saves
    the code to load it beside its weights. Its config holds the lineage.

    Args:
        compensate: statistics of this very model with second moments; fold what is removed into what stays (see
            `compensate_linear`): heads and neurons, and channels of the residual stream where they have `hidden_moments`.
        bypasses: what `fit_bypasses` found for this very model and plan; the FFN before what is removed whole (layers,
            attentions, FFNs) takes over what that added. It is fitted to all tokens alike, its own removed neurons included.
        ridge: how strongly: the share of the mean square of a linear's inputs that damps its fit. A larger one changes the
            kept weights less; None: not at all, whatever is given. `choose_strength` finds the best on held-out rows.

    Raises:
        InputError: if the plan does not fit the model, the model is not in memory whole, the statistics have no moments or
            other sizes, or the bypasses are of another plan.
        NotFinite: a weight of the pruned model is nan or infinite.
    """
    raise_all(exits_to_prune(model.config, "model", type(model).__name__))
    plan.check(model)
    if bypasses is not None and (bypasses.plan.layers != plan.layers or (bypasses.norms and plan.hidden is not None)):
        raise InputError("bypasses", "bypasses of another plan", "the result of fit_bypasses for the given plan")
    check_in_memory(model)
    if compensate is not None:
        _check_statistics(model, compensate)
    lineage = lineage_after(model, plan)
    repaired = {} if ridge is None else _repaired(model, plan, compensate, bypasses, ridge)
    if compensate is not None and plan.hidden is not None and ridge is not None:
        repaired |= repaired_stream(model, plan.layers, torch.tensor(plan.hidden), compensate, ridge)
    return _cut(model, plan, lineage, repaired)


def prune_skeleton(model: PreTrainedModel, plan: PruningPlan) -> PreTrainedModel:
    """As `prune` of a model on the meta device: sizes, and no weights."""
    plan.check(model)
    return _cut(model, plan, lineage_after(model, plan), {})


def _cut(
    model: PreTrainedModel,
    plan: PruningPlan,
    lineage: ModelPlan,
    repaired: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]],
) -> PreTrainedModel:
    """What the plan keeps of a model, with repaired weights and biases (by the student's names) in their places."""
    stock = stock_record(model.config)
    student = _structure_of(model)
    shrink(student, plan, lineage=lineage)
    modules: dict[str, Any] = dict(student.named_modules())
    for name, (weight, bias) in repaired.items():
        if (module := modules.get(name)) is None:  # of an attention that is gone
            continue
        module.weight = nn.Parameter((weight.T if isinstance(module, Conv1D) else weight).contiguous())
        if bias is not None:
            module.bias = nn.Parameter(bias)
    _own_weights(student, model)
    write_lineage(student.config, stock, lineage)
    base = stock_class(type(model))
    try:
        become_stock(student, base)
    except NotStock:
        student.__class__ = pruned_class(base)
        student.config.__class__ = pruned_config_class(type(student.config))
        if student.base_model is student:
            # transformers learns which outputs a class records when the first model of the class is made.
            with torch.device("meta"):
                type(student)(copy.deepcopy(student.config))
    check_weights(student, "prune a model with finite weights: rows of unused tokens may be set to 0")
    return student.requires_grad_(True).train(model.training)


def stock_expressible(student: PreTrainedModel) -> bool:
    """Whether plain transformers can load this model: whether its class is one of theirs."""
    return stock_class(type(student)) is type(student)


def why_not_stock(student: PreTrainedModel) -> str | None:
    """In one line, why plain transformers cannot load a pruned model without the code beside it; None where they can."""
    if stock_expressible(student):
        return None
    try:
        stock_twin(student, stock_class(type(student)))
    except NotStock as error:
        return str(error)
    return None


def _structure_of(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that still shares its weights with the model."""
    student = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    for name in ("forward", "_original_forward"):  # accelerate's wrapper around the forward of the model itself
        student.__dict__.pop(name, None)
    if hasattr(student.config, "auto_map"):
        del student.config.auto_map
    return student


def _own_weights(student: PreTrainedModel, model: PreTrainedModel) -> None:
    shared = {id(parameter) for parameter in model.parameters()}
    copies: dict[int, nn.Parameter] = {}
    for name, parameter in list(student.named_parameters(remove_duplicate=False)):
        if id(parameter) in shared:
            own = copies.setdefault(id(parameter), nn.Parameter(parameter.detach().clone()))
            parent, _, last = name.rpartition(".")
            setattr(student.get_submodule(parent), last, own)


def _repaired(
    model: PreTrainedModel,
    plan: PruningPlan,
    statistics: Statistics | None,
    bypasses: Bypasses | None,
    ridge: float,
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Weights and biases that change, by the student's names.

    These are the linears that read a layer's units, (outputs, kept inputs), where they lose an input or take over what others
    added, and the norms that take another's place.
    """
    family, dims, prefix, found = family_of(model), dims_of(model.config), layer_prefix(model), {}
    out = slice(None) if plan.hidden is None else torch.tensor(plan.hidden)
    counts = counts_of(model)
    for index, row in enumerate(plan.layers):
        for place, (path, layout) in enumerate(family.readers):
            if bypasses is not None and (row.source, path) in bypasses.outputs:
                continue  # all but its bias is another's
            module = linear(layers_of(model)[row.source], path)
            kept = kept_channels(layout, row, counts[row.source], dims.head_size)
            if bypasses is not None and path == family.ffn_out and row.source in bypasses.moments:
                weight, bias = bypasses.folded(module, row.source, kept, ridge)
            elif statistics is None or len(kept) == weight_of(module).shape[1]:
                continue
            else:
                moments = _moments(statistics, row.source)[place]
                weight, bias = compensate_linear(weight_of(module), module.bias, moments, kept, ridge)
            found[f"{prefix}{index}.{path}"] = weight[out], None if bias is None else bias[out]
        if bypasses is not None and row.source in bypasses.norms:
            layer, path = bypasses.norms[row.source]
            norm: Any = layers_of(model)[layer].get_submodule(path)
            bias = getattr(norm, "bias", None)
            found[f"{prefix}{index}.{path}"] = (
                norm.weight.detach().clone(),
                None if bias is None else bias.detach().clone(),
            )
    return found


def _moments(statistics: Statistics, layer: int) -> tuple[Moments, ...]:
    if not statistics.moments:
        raise InputError("compensate", "statistics without moments", "statistics collected with moments=True")
    return statistics.moments[layer]


def _check_statistics(model: PreTrainedModel, statistics: Statistics) -> None:
    counts = counts_of(model)
    found = {
        kind: [len(row.taylor) for row in statistics.units[kind]] for kind in LAYER_UNITS if kind in statistics.units
    }
    if found != {kind: [each[kind] for each in counts] for kind in found}:
        raise InputError("compensate", "statistics of a model of other sizes", "statistics of the model that is pruned")
