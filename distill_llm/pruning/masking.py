"""A model as if pruned: masks at the very places where pruning cuts."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.pruning.modeling_pruned import (
    LayerLineage,
    dims_of,
    family_of,
    hidden_axes,
    kept_channels,
    layer_axes,
    layer_prefix,
    layers_of,
    lineage_of,
)
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.structure import inputs_of, linear, sizes_of


@contextmanager
def masked(model: PreTrainedModel, plan: PruningPlan) -> Iterator[PreTrainedModel]:
    """Within the context the model gives what `prune(model, plan)` gives, and nothing is removed.

    Removed heads and neurons are zeroed where they enter the attention-output and FFN-down linears; a removed layer passes
    its input on. Removed channels of the residual stream are zeroed wherever they are written, and left out of norms.

    Raises:
        InputError: if the plan does not fit the model.
    """
    plan.check(model)
    family, head_size, sizes = family_of(model), dims_of(model.config).head_size, sizes_of(model)
    rows = {row.source: row for row in plan.layers}
    with ExitStack() as stack:
        if plan.hidden is not None:
            stack.enter_context(_masked_hidden(model, torch.tensor(plan.hidden)))
        for index, layer in enumerate(layers_of(model)):
            if index not in rows:
                stack.callback(layer.register_forward_hook(_pass_on, with_kwargs=True).remove)
                continue
            row = LayerLineage(index, rows[index].heads, rows[index].neurons, rows[index].queries)
            for path, layout in ((family.attention_out, "q"), (family.ffn_out, "n")):
                module = linear(layer, path)
                mask = torch.zeros(inputs_of(module), device=module.weight.device, dtype=module.weight.dtype)
                mask[kept_channels(layout, row, sizes[index], head_size)] = 1
                stack.callback(module.register_forward_pre_hook(_multiply(mask)).remove)
            stack.enter_context(_norms_over_heads(layer, row, index, model))
        yield model


def _multiply(mask: torch.Tensor) -> Callable:
    return lambda module, args: (args[0] * mask.to(args[0].dtype), *args[1:])


def _pass_on(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
    entering = args[0] if args else kwargs["hidden_states"]
    return (entering, *output[1:]) if isinstance(output, tuple) else entering


@contextmanager
def _norms_over_heads(layer: nn.Module, row: LayerLineage, index: int, model: PreTrainedModel) -> Iterator[None]:
    """Norms that span all heads (OLMo2) see the kept ones only."""
    head_size, sizes = dims_of(model.config).head_size, sizes_of(model)[index]
    with ExitStack() as stack:
        for name, (_, layout) in layer_axes(layer, family_of(model)).items():
            path, _, last = name.rpartition(".")
            module = layer.get_submodule(path) if last == "weight" else None
            if module is None or not _is_norm(module) or layout not in ("q", "kv") or not row.heads:
                continue
            stack.enter_context(_norm_over(module, kept_channels(layout, row, sizes, head_size)))
        yield


def _is_norm(module: nn.Module) -> bool:
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
    modules, prefix, lineage = dict(model.named_modules()), layer_prefix(model), lineage_of(model)
    with ExitStack() as stack:
        for name, dims in hidden_axes(model).items():
            path, _, last = name.rpartition(".")
            if lineage and path.startswith(prefix):
                source, _, rest = path.removeprefix(prefix).partition(".")
                places = [str(i) for i, row in enumerate(lineage) if str(row.source) == source]
                path = f"{prefix}{places[0]}.{rest}" if places else ""
            module = modules.get(path)
            if module is None or last != "weight":
                continue
            mask = torch.zeros(module.weight.shape[dims[0]], device=module.weight.device)
            mask[kept] = 1
            into = int(not isinstance(module, Conv1D))
            if _is_norm(module):
                stack.enter_context(_norm_over(module, kept))
                continue
            if isinstance(module, nn.Embedding) or 1 - into in dims:
                stack.callback(module.register_forward_hook(_multiply_output(mask)).remove)
            if not isinstance(module, nn.Embedding) and into in dims:  # a table of positions may be read unseen
                stack.callback(module.register_forward_pre_hook(_multiply(mask)).remove)
        yield


def _multiply_output(mask: torch.Tensor) -> Callable:
    return lambda module, args, output: output * mask.to(output.device, output.dtype)
