"""Models held still for a while: eval mode, no gradients, outputs by name, another forward. Everything is undone at the end."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def named_outputs(model: nn.Module) -> Iterator[None]:
    """Within the context a model gives its outputs by name, also if its config has `return_dict: false`.

    An argument of the forward would not do: heads of decoders read the outputs of the model below them by name, but do not
    ask it for names.
    """
    config = getattr(model, "config", None)
    if getattr(config, "return_dict", True) is not False:
        yield
        return
    config.return_dict = True  # type: ignore[union-attr]
    try:
        yield
    finally:
        config.return_dict = False  # type: ignore[union-attr]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and outputs by name within the context; every module gets its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with named_outputs(model):
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode, and no gradient for any weight, within the context; both are restored."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model):
        model.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context the module computes `forward`; hooks on the module itself still run."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def passed_on(args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> Any:
    """What a layer that is skipped gives: the hidden states that it reads, beside the rest of its `output` (a cache)."""
    entering = args[0] if args else kwargs["hidden_states"]
    return (entering, *output[1:]) if isinstance(output, tuple) else entering
