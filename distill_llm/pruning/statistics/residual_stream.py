"""The residual stream: which norms write its tensors, and which linears read them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.modeling_pruned import hidden_dims, layer_prefix
from distill_llm.architectures.modes import frozen
from distill_llm.common.errors import InputError
from distill_llm.pruning.statistics.calibration_loss import calibration_loss
from distill_llm.pruning.statistics.record import StreamTensor


def stream_norms(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The norms over the residual stream, by name."""
    found = {}
    for name in hidden_dims(model):
        path, _, last = name.rpartition(".")
        if last == "weight" and "Norm" in type(module := model.get_submodule(path)).__name__:
            found[path] = module
    return found


def stream_readers(model: PreTrainedModel) -> dict[str, nn.Linear | Conv1D]:
    """The linears whose input channels are the residual stream's, by name; a head tied to embeddings is none of them."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[str, nn.Linear | Conv1D] = {}
    for name, dims in hidden_dims(model).items():
        path, _, last = name.rpartition(".")
        module = model.get_submodule(path)
        if last != "weight" or not isinstance(module, nn.Linear | Conv1D) or id(module.weight) in tables:
            continue
        if int(not isinstance(module, Conv1D)) in dims and module.weight.numel():
            found[path] = module
    return found


def stream_tensors(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> list[StreamTensor]:
    """What the model's norms give out and its linears read of the residual stream, in one forward of a batch's first example."""
    norms, readers = stream_norms(model), stream_readers(model)
    held: list[torch.Tensor] = []  # so that no other tensor gets their memory
    norm_of: dict[int, str] = {}
    readers_of: dict[int, list[str]] = {}

    def writes(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            held.append(output)
            norm_of[_memory(output)] = name
            readers_of.setdefault(_memory(output), [])

        return hook

    def reads(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            held.append(args[0])
            readers_of.setdefault(_memory(args[0]), []).append(name)

        return hook

    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(frozen(model))
        for name, module in norms.items():
            stack.callback(module.register_forward_hook(writes(name)).remove)
        for name, module in readers.items():
            stack.callback(module.register_forward_pre_hook(reads(name)).remove)
        calibration_loss(model, {k: v[:1].to(model.device) for k, v in batch.items()}, None, None, torch.Generator())
    return [StreamTensor(norm_of.get(memory, ""), tuple(names)) for memory, names in readers_of.items()]


def channel_readers(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor]
) -> tuple[list[nn.Linear | Conv1D], list[StreamTensor]]:
    """Where the residual stream's channels are read: by which linears in layers, and as which tensors after them.

    These are what the last norm below the head gives out and, of heads that give one answer, what else their linears read. Of
    the channels that a language model's head makes for itself, which masks at chosen tokens would tell of, nothing is said.

    Raises:
        InputError: for a model whose norms have no weights, by which channels are found.
    """
    prefix, base, tensors = layer_prefix(model), set(model.base_model.modules()), stream_tensors(model, batch)
    inside = [name for tensor in tensors for name in tensor.readers if name.startswith(prefix)]
    normed = [tensor for tensor in tensors if tensor.norm and model.get_submodule(tensor.norm) in base]
    if not normed:
        fix = "collect with CalibrationSettings(hidden=False): channels are found by the weights of the norms over them"
        raise InputError("model", f"{type(model).__name__}, whose norms have no weights", fix=fix)
    last = normed[-1]
    after = [last]
    if model.get_output_embeddings() is None:
        after += [each for each in tensors if each.readers and not {*each.readers} & {*inside} and each != last]
    return [model.get_submodule(name) for name in inside], after  # type: ignore[misc]


def _memory(tensor: torch.Tensor) -> int:
    """The same for a tensor and the parts of it that heads read (a first token, a slice)."""
    return tensor.untyped_storage().data_ptr()


@contextmanager
def seen(model: PreTrainedModel, tensor: StreamTensor, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Within the context `see` is called with the tensor at every forward."""
    if tensor.norm:
        after: Any = lambda module, args, output: see(output)  # noqa: E731
        handle = model.get_submodule(tensor.norm).register_forward_hook(after)
    else:
        before: Any = lambda module, args: see(args[0])  # noqa: E731
        handle = model.get_submodule(tensor.readers[0]).register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
