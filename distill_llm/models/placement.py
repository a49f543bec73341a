"""Where weights and activations are: whole in memory, checkpointed, or on another device one layer at a time."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill_llm.architectures.modes import forward_as
from distill_llm.common.errors import InputError


def check_in_memory(model: nn.Module, one_device: bool = False) -> None:
    """Raise InputError if weights are offloaded, or, with `one_device`, spread over several devices."""
    devices, accepted = (
        sorted({str(parameter.device) for parameter in model.parameters()}),
        "a model loaded whole on one device",
    )
    if "meta" in devices:
        raise InputError("model", "weights that are not in memory (offloaded)", accepted)
    if one_device and len(devices) > 1:
        raise InputError("model", f"weights on {' and '.join(devices)}", accepted)


@contextmanager
def checkpointed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within the context each layer keeps nothing of its forward but the input, and runs again in the backward pass.

    The hidden states that a layer reads must require a gradient. Hooks inside a layer see two forwards, the first without
    gradients. (Chen et al. 2016, "Training deep nets with sublinear memory cost".)
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(forward_as(layer, partial(_twice, layer.forward)))
        yield


def _twice(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # Only positional arguments get gradients, and of those the hidden states alone need one.
    args = args or (kwargs.pop("hidden_states"),)
    return checkpoint(partial(forward, **kwargs), *args, use_reentrant=True, preserve_rng_state=False)


@contextmanager
def streamed(model: nn.Module, layers: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the context the model computes on `device`, with the weights of one of its layers there at a time.

    Everything outside the layers is there throughout. What a forward keeps for the backward pass also keeps the layers' weights
    there, unless the layers are `checkpointed`.
    """
    layers = list(layers)
    inside = {id(module) for layer in layers for module in layer.modules()}
    with ExitStack() as stack:
        stack.enter_context(placed([module for module in model.modules() if id(module) not in inside], device))
        for layer in layers:
            stack.enter_context(forward_as(layer, partial(_on_device, layer, layer.forward, device)))
        yield


def _on_device(layer: nn.Module, forward: Callable[..., Any], device: torch.device, *args: Any, **kwargs: Any) -> Any:
    with placed(layer.modules(), device):
        return forward(*args, **kwargs)


@contextmanager
def placed(modules: Iterable[nn.Module], device: torch.device) -> Iterator[None]:
    """Within the context the modules' own weights and buffers are copies on `device`; shared tensors have one copy."""
    tables: list[dict[str, Any]] = [table for module in modules for table in (module._parameters, module._buffers)]
    before = [dict(table) for table in tables]
    copies: dict[int, torch.Tensor] = {}

    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copy = tensor.detach().to(device, copy=True)
            copies[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
        return copies[id(tensor)]

    try:
        for table in tables:
            table.update({name: copied(tensor) for name, tensor in table.items() if tensor is not None})
        copies.clear()
        yield
    finally:
        for table, own in zip(tables, before, strict=True):
            table.update(own)
