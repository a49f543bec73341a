"""A model as if pruned: masks at the very places where pruning cuts."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import dims_of, family_of, layers_of
from distill_llm.architectures.lineage import Counts, LayerPlan
from distill_llm.architectures.modeling_pruned import (
    hidden_dims,
    inputs_of,
    kept_channels,
    layer_axes,
)
from distill_llm.architectures.modes import passed_on
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.units.sizes import counts_of, linear


@contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """Within the context the model gives what `prune(model, plan)` gives, and nothing is removed.

    Removed heads and neurons are zeroed where they enter the attention-output and FFN-down linears; a removed layer passes
    its input on. Removed channels of the residual stream are zeroed wherever they are written, and left out of norms.

    Raises:
        InputError: if the plan does not fit the model.
    """
    plan.check(model)
    family, head_size, counts = family_of(model), dims_of(model.config).head_size, counts_of(model)
    rows = {row.source: row for row in plan.layers}
    with ExitStack() as stack:
        if plan.hidden is not None:
            stack.enter_context(_masked_hidden(model, torch.tensor(plan.hidden)))
        for index, layer in enumerate(layers_of(model)):
            if index not in rows:
                stack.callback(layer.register_forward_hook(_pass_on, with_kwargs=True).remove)
                continue
            row = rows[index]
            for path, layout in family.readers:
                module = linear(layer, path)
                mask = torch.zeros(inputs_of(module), device=module.weight.device)
                mask[kept_channels(layout, row, counts[index], head_size)] = 1
                stack.callback(module.register_forward_pre_hook(_multiply(mask)).remove)
            stack.enter_context(_norms_over_heads(model, layer, row, counts[index]))
        yield model


def _multiply(mask: torch.Tensor) -> Callable:
    return lambda module, args: (args[0] * mask.to(args[0].device, args[0].dtype), *args[1:])


def _pass_on(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    return passed_on(args, kwargs, output)


@contextmanager
def _norms_over_heads(model: PreTrainedModel, layer: nn.Module, row: LayerPlan, counts: Counts) -> Iterator[None]:
    """Norms that span all heads (OLMo2) see the kept ones only."""
    with ExitStack() as stack:
        for name, (_, layout) in layer_axes(layer, family_of(model)).items():
            path, _, last = name.rpartition(".")
            if last == "weight" and layout in ("q", "kv") and row.heads and is_norm(layer.get_submodule(path)):
                kept = kept_channels(layout, row, counts, dims_of(model.config).head_size)
                stack.enter_context(_norm_over(layer.get_submodule(path), kept))
        yield


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm, by the name of its class."""
    return "Norm" in type(module).__name__


@contextmanager
def _norm_over(module: nn.Module, kept: torch.Tensor) -> Iterator[None]:
    """A norm that sees the kept channels only and gives zero at the others."""
    small = copy.deepcopy(module)
    for name, parameter in module.named_parameters(recurse=False):
        setattr(small, name, nn.Parameter(parameter.detach()[kept.to(parameter.device)], requires_grad=False))
    if isinstance(small, nn.LayerNorm):
        small.normalized_shape = (len(kept),)

    def hook(norm: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        where = kept.to(output.device)
        return torch.zeros_like(output).index_copy(-1, where, small(args[0][..., where]).to(output.dtype))

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _masked_hidden(model: PreTrainedModel, kept: torch.Tensor) -> Iterator[None]:
    with ExitStack() as stack:
        for name, dims in hidden_dims(model).items():
            path, _, last = name.rpartition(".")
            if last != "weight":
                continue
            module = model.get_submodule(path)
            if is_norm(module):
                stack.enter_context(_norm_over(module, kept))
                continue
            weight = model.get_parameter(name)
            mask = torch.zeros(weight.shape[dims[0]], device=weight.device)
            mask[kept] = 1
            into = int(not isinstance(module, Conv1D))
            if isinstance(module, nn.Embedding) or 1 - into in dims:
                of_image = mask[:, None, None] if isinstance(module, nn.Conv2d) else mask  # patches, not yet in a row
                stack.callback(module.register_forward_hook(_multiply_output(of_image)).remove)
            if not isinstance(module, nn.Embedding) and into in dims:  # a table of positions may be read unseen
                stack.callback(module.register_forward_pre_hook(_multiply(mask)).remove)
        yield


def _multiply_output(mask: torch.Tensor) -> Callable:
    return lambda module, args, output: output * mask.to(output.device, output.dtype)
