"""A model's layers run one at a time, each over all calibration batches, so that a layer can change before the next one runs."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.architectures.family import Family
from distill_llm.architectures.modes import forward_as, passed_on
from distill_llm.common.errors import InputError
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.placement import placed, streamed
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.units.sizes import linear

Batch = Mapping[str, torch.Tensor]
Streams = list[torch.Tensor]
"""The residual stream of every batch, (R, T, H) each, in main memory."""


class _Enough(Exception):
    """Ends a forward pass of which nothing more is needed."""


@dataclass(frozen=True)
class _Kept:
    """A tensor in main memory, and the device that it is from."""

    tensor: torch.Tensor
    device: torch.device


class LayerRuns:
    """A model's layers over calibration batches. The model is frozen by the caller.

    What the model hands to a layer beside the stream (masks, positions) is found once, without running any layer, and kept in
    main memory.

    Args:
        batches: this process's batches; there may be none.
        settings: the device and precision.

    Attributes:
        first: the stream that enters the first layer. Whoever runs the layers takes it away, so that it is freed.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], settings: CalibrationSettings):
        self.model, self.layers, self.settings = model, list(layers_of(model)), settings
        self.device = settings.device_for(model)
        self.first: Streams = []
        self._calls: list[list[tuple[tuple, dict[str, Any]]]] = []
        with ExitStack() as stack:
            stack.enter_context(self._autocast())
            if self.device != model.device:
                stack.enter_context(streamed(model, self.layers, self.device))
            shapes = self._outputs(batches[0]) if batches else []
            for batch in batches:
                stream, calls = self._calls_of(batch, shapes)
                self.first.append(stream)
                self._calls.append(calls)

    def _autocast(self) -> torch.autocast:
        precision = self.settings.precision
        return torch.autocast(self.device.type, precision, enabled=precision is not None)

    def _forward(self, batch: Batch) -> None:
        self.model(**forward_inputs(self.model, {name: value.to(self.device) for name, value in batch.items()}))

    def _outputs(self, batch: Batch) -> list[Any]:
        """What each layer gives for a batch's first example: a stream, alone or first in a tuple."""
        found: list[Any] = []
        with ExitStack() as stack:
            for layer in self.layers:
                hook = layer.register_forward_hook(lambda module, args, output: found.append(output))
                stack.callback(hook.remove)
            self._forward({name: value[:1] for name, value in batch.items()})
        return found

    def _calls_of(self, batch: Batch, shapes: Sequence[Any]) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
        """The stream that enters the first layer, and every layer's arguments, the stream left out."""
        streams: list[torch.Tensor] = []
        calls: list[tuple[tuple, dict[str, Any]]] = []
        passed: dict[int, tuple[torch.Tensor, _Kept]] = {}  # by id, which no other tensor gets meanwhile

        def kept(tensor: torch.Tensor) -> _Kept:
            """One copy of what all layers are given."""
            if id(tensor) not in passed:
                passed[id(tensor)] = tensor, _Kept(tensor.cpu(), tensor.device)
            return passed[id(tensor)][1]

        def note(shape: Any, *args: Any, **kwargs: Any) -> Any:
            streams.append(args[0] if args else kwargs["hidden_states"])
            call = ((None, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": None})
            calls.append(tree_map_only(torch.Tensor, kept, call))
            if len(calls) == len(self.layers):
                raise _Enough
            return passed_on(args, kwargs, shape)

        with ExitStack() as stack:
            for layer, shape in zip(self.layers, shapes, strict=True):
                stack.enter_context(forward_as(layer, partial(note, shape)))
            stopped(partial(self._forward, batch))
        return streams[0].cpu(), calls

    @contextmanager
    def layer(self, index: int) -> Iterator[Callable[[int, torch.Tensor], torch.Tensor]]:
        """Within the context, a function that runs one layer: (number of a batch, the stream before it) -> the one after it.

        The stream is moved to the device, and what comes out stays there.
        """
        layer = self.layers[index]

        def run(number: int, stream: torch.Tensor) -> torch.Tensor:
            args, kwargs = tree_map_only(_Kept, lambda its: its.tensor.to(its.device), self._calls[number][index])
            stream = stream.to(self.device)
            with self._autocast():
                if args:
                    output = layer(stream, *args[1:], **kwargs)
                else:
                    output = layer(**{**kwargs, "hidden_states": stream})
            return output[0] if isinstance(output, tuple) else output

        with self._placed(layer.modules()):
            yield run

    def outputs(self, module: nn.Linear | Conv1D, inputs: Streams) -> Streams:
        """What a linear of a layer gives for its inputs of every batch, in main memory. The list of inputs is emptied."""
        found: Streams = []
        with self._placed([module]), self._autocast():
            while inputs:
                found.append(module(inputs.pop(0).to(self.device)).cpu())
        return found

    @contextmanager
    def _placed(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Within the context the weights of modules are on the device."""
        with ExitStack() as stack:
            if self.device != self.model.device:
                stack.enter_context(placed(modules, self.device))
            yield


@contextmanager
def noted(modules: Sequence[nn.Linear | Conv1D]) -> Iterator[list[torch.Tensor]]:
    """Within the context, the last outputs of linears. They are copies: a layer may add to them in place (Falcon)."""
    found: list[Any] = [None] * len(modules)
    with ExitStack() as stack:
        for place, module in enumerate(modules):

            def note(module: nn.Module, args: Any, output: torch.Tensor, place: int = place) -> None:
                found[place] = output.clone()

            stack.callback(module.register_forward_hook(note).remove)
        yield found


def read_by(module: nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """What a module reads in a forward pass, which ends there."""
    found: list[torch.Tensor] = []

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0])
        raise _Enough

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(note).remove)
        stopped(run)
    return found[0]


@contextmanager
def attention_gives(layer: nn.Module, family: Family, output: torch.Tensor) -> Iterator[None]:
    """Within the context a layer's attention gives a known output, as a module without heads gives its bias (`NoHeads`).

    Args:
        output: (R, T, H), of the attention's output linear.
    """

    def known(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return (output + args[0] if family.adds_residual else output), None

    with forward_as(layer.get_submodule(family.attention), known):
        yield


def stopped(run: Callable[[], Any]) -> None:
    """Run a forward pass that may end early."""
    with suppress(_Enough):
        run()


def residual_factor(config: PreTrainedConfig) -> float:
    """What layers multiply the outputs of attention and FFN by before they add them to the stream (Granite); mostly 1."""
    return float(getattr(config, "residual_multiplier", 1.0))


@torch.no_grad()
def adding_faults(model: PreTrainedModel, batch: Batch, settings: CalibrationSettings, field: str) -> list[InputError]:
    """A fault of a layer that does anything else than to add its attention-output and FFN-down linears' outputs to what it reads.

    It is measured on the first example of a batch, in the model's own precision.

    Args:
        field: what asks for compensation in order.
    """
    batch = {name: value[:1] for name, value in batch.items()}
    runs = LayerRuns(model, [batch], CalibrationSettings(device=settings.device))
    family, factor, stream = family_of(model), residual_factor(model.config), runs.first[0]
    mask = batch["attention_mask"].flatten().bool().cpu() if "attention_mask" in batch else slice(None)
    for index, layer in enumerate(runs.layers):
        before = stream
        linears = [linear(layer, path) for path in (family.attention_out, family.ffn_out)]
        with noted(linears) as found, runs.layer(index) as run:
            stream = run(0, before).cpu()
        rows = [each.flatten(0, -2).double().cpu()[mask] for each in (before, stream, *found)]
        change, size = rows[1] - rows[0], float(rows[0].norm() + rows[1].norm())
        # A few values may be so large (massive activations) that rounding takes more than a layer adds to them.
        near = 1e-3 * float(change.norm()) + torch.finfo(stream.dtype).eps * size
        off = float((change - factor * (rows[2] + rows[3])).norm())
        if not math.isfinite(off):
            fix = f"set it to true: layer {index} gives values that are not finite"
            return [InputError(field, "in_order", fix=fix)]
        if off > near:
            fix = f"set it to true: layer {index} of {model.config.model_type} does more than add what attention and FFN give"
            return [
                InputError(field, "in_order", fix=f"{fix} to the residual stream, so that a linear cannot correct it")
            ]
    return []
