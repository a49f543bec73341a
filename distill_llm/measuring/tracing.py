"""Work without numbers: shapes alone go through the real code, and bytes and FLOPs are counted.

The tensors are torch's fake ones of a CPU. They hold nothing, so a model of any size can be followed.
"""

import math
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from distill_llm.measuring.counting import flop_counter
from distill_llm.measuring.live import LiveStorages

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Traced:
    """What some work takes, beside the weights of its models.

    Attributes:
        peak: bytes alive at once, at most.
        ungraded: the same without gradients of weights.
        activations: the same without copies of weights in another dtype, too.
        gradients: bytes of the weights' gradients.
        flops: floating point operations, a multiply-add as two.
    """

    peak: int
    ungraded: int
    activations: int
    gradients: int
    flops: int


@contextmanager
def shapes_alone(gpu: bool = False, counted: float = 1.0) -> Iterator[None]:
    """Inside, tensors are made without numbers, and questions about numbers get the answers of full-length rows.

    Args:
        gpu: hold what dropout and attention hold on a GPU: masks of a byte, and no attention probabilities.
        counted: the share of the tokens that a search for those with a label finds.
    """
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings(action="ignore"))  # that shapes have no memory to point to
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(_Answers(counted))
        if gpu:
            stack.enter_context(_AsOnGpu())
        yield


def without_numbers(model: nn.Module) -> None:
    """Make a model of the meta device one of shapes alone, inside `shapes_alone`; it stays where it is for good."""
    model.to_empty(device="cpu")
    owner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if owner is not None:
        owner.tie_weights()  # each weight has become one of its own
    model.to = lambda *_, **__: model  # type: ignore[assignment,method-assign]


def traced(work: Callable[[], Any], models: Collection[nn.Module]) -> Traced:
    """Do some work of these models once and count. Inside `shapes_alone`, nothing is computed."""
    known = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    with _Weighed(known) as live, flop_counter() as counter:
        work()
        learned = [parameter.grad for parameter in known if parameter.grad is not None]
        gradients = {live.number(gradient) for gradient in learned}
        flops = counter.get_total_flops()
    sizes = sum(gradient.numel() * gradient.element_size() for gradient in learned)
    rest = live.peak_without(gradients), live.peak_without(gradients | live.casts)
    return Traced(live.peak, *rest, sizes, flops)


class _Weighed(LiveStorages):
    """Also notes copies of known tensors in another dtype, as mixed precision makes them."""

    def __init__(self, known: Collection[torch.Tensor]):
        super().__init__(known)
        self.casts: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func is _ATEN._to_copy.default and self.seen.get(args[0].untyped_storage()) == -1:
            self.casts.add(self.number(out))
        return out


class _Answers(TorchDispatchMode):
    """Answers what depends on numbers: every token counts, every comparison holds, every number is one."""

    def __init__(self, counted: float):
        super().__init__()
        self.counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN.nonzero.default:
            found = math.ceil(args[0].numel() * self.counted)
            return args[0].new_empty((found, args[0].dim()), dtype=torch.long)
        if func is _ATEN.bincount.default:
            least = args[2] if len(args) > 2 else (kwargs or {}).get("minlength", 0)
            return args[0].new_empty(max(least, 1), dtype=torch.float if args[1:2] not in ((), (None,)) else torch.long)
        if func is _ATEN.allclose.default or func is _ATEN.equal.default:
            return True
        if func is _ATEN._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        if func is _ATEN.index.Tensor:
            args = (args[0], [part for index in args[1] for part in self._whole(index)])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _whole(index: torch.Tensor | None) -> list[torch.Tensor | None]:
        """A mask as the indices of all that it covers."""
        if index is None or index.dtype != torch.bool:
            return [index]
        return [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]


class _AsOnGpu(TorchFunctionMode):
    """Dropout and attention by the kernels of a GPU, as to what they hold."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0  # the mask is drawn again in the backward pass
        if func is functional.dropout and kwargs.get("training", True) and kwargs.get("p", 0.5) > 0:
            return torch.native_dropout(args[0], kwargs.get("p", 0.5), True)[0]
        return func(*args, **kwargs)
