"""Backward products of frozen linears in bf16: gradients that are good enough to rank units, in a fraction of the time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.modes import forward_as
from distill_llm.common.precision import fast_bf16
from distill_llm.pruning.units.sizes import weight_of


class _Backward(torch.autograd.Function):
    """Passes an output on; the gradient of the linear's input is gradient @ weight, in bf16."""

    @staticmethod
    def forward(ctx: Any, entering: torch.Tensor, output: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return output.data  # the same memory, but no view: Falcon adds to it in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        product = gradient.to(torch.bfloat16) @ weight.to(torch.bfloat16)  # one copy at a time
        return product.to(gradient.dtype), None, None


@contextmanager
def fast_backward(layers: nn.ModuleList, device: torch.device) -> Iterator[None]:
    """Within the context, gradients pass the fp32 linears of `layers` in bf16, where `device` multiplies faster in it.

    The forward pass is untouched. The weights get no gradient, so they must need none. Each is rounded when it is needed, so one
    copy is held at a time. An entry of a gradient gains a relative rounding error of about 2^-9 at each linear that it passes;
    the order of scores hardly moves (scripts/bench/RESULTS.md).
    """
    with ExitStack() as stack:
        for module in layers.modules() if fast_bf16(device) else ():
            if not isinstance(module, nn.Linear | Conv1D) or module.weight.dtype != torch.float32:
                continue
            if module.weight.numel():
                stack.enter_context(forward_as(module, partial(_forward, module, module.forward)))
        yield


def _forward(module: nn.Linear | Conv1D, forward: Callable[..., torch.Tensor], entering: torch.Tensor) -> torch.Tensor:
    if not entering.requires_grad:
        return forward(entering)
    output: torch.Tensor = _Backward.apply(entering, forward(entering.detach()), weight_of(module).detach())
    return output
