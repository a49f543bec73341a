"""A model with single weights set to zero, and the masks that say which."""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import layers_of
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.finite import check_weights
from distill_llm.models.adapters import unmerged_faults
from distill_llm.models.masks import Masks, linears_of
from distill_llm.models.placement import check_in_memory
from distill_llm.pruning.statistics.calibration_loss import Loss
from distill_llm.pruning.statistics.calibration_pass import Batches
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.weights.choosing import lowest_of_groups, removed
from distill_llm.pruning.weights.inputs import collect_inputs, inputs_of
from distill_llm.pruning.weights.rules import SparsityRules
from distill_llm.pruning.weights.sparsegpt import choose_groups, choose_share, sparsegpt


def sparsify(
    model: PreTrainedModel,
    batches: Batches = (),
    rules: SparsityRules | None = None,
    *,
    loss: Loss = "labels",
    layers_at_once: int | None = None,
    progress: float = 1.0,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> tuple[PreTrainedModel, Masks]:
    """A copy of a model in which single weights of its layers' linears are zero, and the masks of those that stay.

    Weights that are zero already go first, so that what an earlier round removed stays removed.

    Args:
        model: of any family; it may be pruned. It is unchanged.
        batches: calibration data as for `collect_statistics`, read once, or once for every group of layers.
        rules: which weights go; None: half of them, by wanda.
        loss: of taylor: what gradients are taken of (see `collect_statistics`).
        layers_at_once: look at so many layers at a time, so that each group sees the inputs that sparse layers give, and only
            its own second moments are held. Costs a forward pass over the data for each group.
        progress: the part of the sparsity that is to be reached now, in (0, 1].
        settings: how passes over calibration data run.

    Raises:
        InputError: a pattern N:M for a linear whose inputs are no multiple of M, taylor for DeBERTa, no calibration data where
            the criterion needs some, or adapters that are not merged.
        NotFinite: a weight, or what a criterion reads, is nan or infinite.
    """
    rules = rules or SparsityRules(sparsity=0.5)
    raise_all(unmerged_faults(model))
    check_in_memory(model, one_device=True)
    check_weights(model, "prune a model with finite weights: rows of unused tokens may be set to 0")
    raise_all(weight_faults(model, rules))
    if layers_at_once is not None and rules.groups is None and rules.competing == "global":
        fix = "leave it out, or choose the scope row or matrix: with global, all layers are compared at once"
        raise InputError("layers_at_once", layers_at_once, fix=fix)
    if rules.needs != "nothing":
        batches = list(batches)
    sparse = copy.deepcopy(model)
    found: dict[str, torch.Tensor] = {}
    for names in _groups_of_layers(sparse, layers_at_once):
        known: Mapping[str, torch.Tensor] = {}
        if rules.needs != "nothing":
            known = collect_inputs(sparse, batches, rules.needs, settings, loss, names)
        linears = {name: module for name, module in linears_of(sparse).items() if name in names}
        found |= (masks := _remove(linears, known, rules, progress))
        Masks(masks).apply(sparse)  # before the next layers are looked at
    return sparse, Masks(found, rules.pattern, rules.criterion)


def weight_faults(model: PreTrainedModel, rules: SparsityRules) -> list[InputError]:
    """A fault of a criterion that the model's linears do not allow, or of a pattern N:M that does not divide their inputs."""
    if rules.needs == "gradients" and getattr(model.config, "relative_attention", False):
        fix = f"choose another: linears of {model.config.model_type} that read distances have no gradient for each example"
        return [InputError("criterion", rules.criterion, fix=fix)]
    if rules.groups is None:
        return []
    for name, module in linears_of(model).items():
        if inputs_of(module) % rules.groups[1]:
            accepted = f"M that divides the inputs of every linear: {name} has {inputs_of(module)}"
            return [InputError("pattern", rules.pattern, accepted)]
    return []


def _groups_of_layers(model: PreTrainedModel, size: int | None) -> Iterator[set[str]]:
    """The names of the linears, so many layers at a time."""
    layers = list(layers_of(model))
    for begin in range(0, len(layers), size or len(layers)):
        inside = {id(each) for layer in layers[begin : begin + (size or len(layers))] for each in layer.modules()}
        yield {name for name, module in linears_of(model).items() if id(module) in inside}


def _remove(
    linears: Mapping[str, nn.Linear | Conv1D],
    known: Mapping[str, torch.Tensor],
    rules: SparsityRules,
    progress: float,
) -> dict[str, torch.Tensor]:
    """Choose weights, repair where the criterion does, and return the masks of what stays; weights are changed in place."""
    share, groups = rules.share * progress, rules.groups
    if rules.needs == "moments":
        gone = {}
        for name, module in linears.items():
            weight, second = _matrix(module), known[name]
            choose, block, every = choose_share(share, weight.shape), rules.block, None
            if groups is not None:
                choose, every = choose_groups(rules.in_group(progress), groups[1]), groups[1]
                block = max(1, rules.block // every) * every
            new, gone[name] = sparsegpt(
                weight, second, choose, block=block, every=every, damping=rules.damping, gone=weight == 0
            )
            with torch.no_grad():
                module.weight.copy_(new.T if isinstance(module, Conv1D) else new)
    else:
        scores = {name: _scores(_matrix(module), known.get(name), rules) for name, module in linears.items()}
        if groups is None:
            gone = removed(scores, share, rules.competing)
        else:
            gone = {name: lowest_of_groups(each, rules.in_group(progress), groups[1]) for name, each in scores.items()}
    return {
        name: ~(each.T if isinstance(linears[name], Conv1D) else each).cpu().contiguous() for name, each in gone.items()
    }


def _scores(weight: torch.Tensor, known: torch.Tensor | None, rules: SparsityRules) -> torch.Tensor:
    """What every weight of (O, I) is worth: |w|, times the norm of its input or its mean absolute gradient; -1 if it is zero."""
    size = weight.detach().float().abs()
    if known is not None:
        size = size * known.to(size.device)  # (I,) or (O, I)
    return size.masked_fill(weight == 0, -1.0)


def _matrix(module: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight as (outputs, inputs), a view."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight
