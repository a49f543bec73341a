"""Functions that listen to the attention of any model, under any kernel.

transformers looks its attention functions up by name. Around a kernel, a function is registered under a name of our own.
It hands queries, keys, values and mask to whoever listens to that attention module, then calls the kernel. A model's
configuration names that function only while someone listens.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from distill_llm.losses.signals import Vectors

PREFIX = "distill_"

Listener = Callable[[nn.Module, Vectors, torch.Tensor | None, dict[str, Any]], None]
"""Called with the module, what it attends with, its mask, and the kernel's other arguments."""

_listeners: WeakKeyDictionary[nn.Module, Listener] = WeakKeyDictionary()


@contextmanager
def listening(configs: Sequence[Any], listeners: Mapping[nn.Module, Listener]) -> Iterator[None]:
    """Within the context, every attention of these modules calls its listener.

    Args:
        configs: of the model, as of `attention_configs`.
        listeners: by module; a module that is no attention is never called.
    """
    _listeners.update(listeners)
    try:
        with kernels_named(configs, _register):
            yield
    finally:
        for module in listeners:
            _listeners.pop(module, None)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configs in a model that name an attention kernel."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


@contextmanager
def kernels_named(configs: Sequence[Any], name: Callable[[str], str]) -> Iterator[None]:
    """Within the context configs name another attention kernel, made of the name of their own."""
    previous = [config._attn_implementation for config in configs]
    try:
        for config, kernel in zip(configs, previous, strict=True):
            config._attn_implementation = name(kernel or "eager")
        yield
    finally:
        for config, kernel in zip(configs, previous, strict=True):
            config._attn_implementation = kernel


def _register(kernel: str) -> str:
    """The name of the recording function around a kernel; registers it when it is not there yet."""
    name = PREFIX + kernel
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            with _named(module.config, kernel):
                if (keep := _listeners.get(module)) is not None:
                    keep(module, Vectors(query, key, value), attention_mask, kwargs)
                return _kernel(kernel, module)(module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    return name


def _kernel(name: str, module: nn.Module) -> Callable[..., Any]:
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    own: Callable[..., Any] = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    return own


@contextmanager
def _named(config: Any, kernel: str) -> Iterator[None]:
    """A layer's config names the kernel itself: that of flash attention loads what it is named there."""
    ours = config._attn_implementation
    config._attn_implementation = kernel
    try:
        yield
    finally:
        config._attn_implementation = ours
