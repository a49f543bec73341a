"""A model's layers run one at a time, each over all calibration batches, so that a layer can change before the next one runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.architectures.modes import forward_as, passed_on
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.placement import placed, streamed
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.units.sizes import linear

Batch = Mapping[str, torch.Tensor]
Streams = list[torch.Tensor]
"""The residual stream of every batch, (R, T, H) each, in main memory."""


class _Enough(Exception):
    """Ends a forward pass of which nothing more is needed."""


class LayerRuns:
    """A model's layers over calibration batches. The model is frozen by the caller.

    What the model hands to a layer beside the stream (masks, positions) is found once, without running any layer.

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

        def note(shape: Any, *args: Any, **kwargs: Any) -> Any:
            streams.append(args[0] if args else kwargs["hidden_states"])
            calls.append(((None, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": None}))
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
            args, kwargs = self._calls[number][index]
            stream = stream.to(self.device)
            with self._autocast():
                if args:
                    output = layer(stream, *args[1:], **kwargs)
                else:
                    output = layer(**{**kwargs, "hidden_states": stream})
            return output[0] if isinstance(output, tuple) else output

        with ExitStack() as stack:
            if self.device != self.model.device:
                stack.enter_context(placed(layer.modules(), self.device))
            yield run


@contextmanager
def noted(
    entering: Sequence[nn.Linear | Conv1D] = (), leaving: Sequence[nn.Linear | Conv1D] = (), stop: bool = False
) -> Iterator[dict[str, list[torch.Tensor]]]:
    """Within the context, the last inputs (`in`) and outputs (`out`) of linears, in the order of the lists that name them.

    Outputs are copies: a layer may add to them in place (Falcon).

    Args:
        stop: end the forward pass as soon as all are there (see `stopped`).
    """
    found: dict[str, list[Any]] = {"in": [None] * len(entering), "out": [None] * len(leaving)}

    def note(kind: str, place: int, value: torch.Tensor) -> None:
        found[kind][place] = value
        if stop and all(each is not None for each in (*found["in"], *found["out"])):
            raise _Enough

    with ExitStack() as stack:
        for place, module in enumerate(entering):
            before = module.register_forward_pre_hook(lambda m, args, place=place: note("in", place, args[0]))
            stack.callback(before.remove)
        for place, module in enumerate(leaving):
            after = module.register_forward_hook(
                lambda m, args, output, place=place: note("out", place, output.clone())
            )
            stack.callback(after.remove)
        yield found


def stopped(run: Callable[[], Any]) -> None:
    """Run a forward pass that may end early."""
    with suppress(_Enough):
        run()


@torch.no_grad()
def residual_factor(model: PreTrainedModel, batch: Batch, settings: CalibrationSettings) -> float | None:
    """The factor c with which every layer adds the outputs of its attention-output and FFN-down linears to what it reads.

    It is 1 in most families, another number in Granite, and None where a layer does anything else: where a norm comes after
    attention or FFN (BERT, Gemma 2). It is measured on the first example of a batch, in the model's own precision.
    """
    runs = LayerRuns(
        model, [{name: value[:1] for name, value in batch.items()}], CalibrationSettings(device=settings.device)
    )
    family, stream = family_of(model), runs.first[0]
    mask = batch["attention_mask"][:1].flatten().bool().cpu() if "attention_mask" in batch else None
    changes: list[torch.Tensor] = []
    added: list[torch.Tensor] = []
    sizes: list[float] = []
    both = total = 0.0
    for index, layer in enumerate(runs.layers):
        adding = [linear(layer, path) for path in (family.attention_out, family.ffn_out)]
        with noted(leaving=adding) as found, runs.layer(index) as run:
            after = run(0, stream).cpu()
        before, stream = stream, after
        rows = [each.flatten(0, -2).double().cpu() for each in (before, after, *found["out"])]
        before, after, attention, ffn = (each if mask is None else each[mask] for each in rows)
        change, own = after - before, attention + ffn
        exact = 1 / (before.square() + after.square()).clamp(min=1e-30)  # large values of a stream are rounded more
        both, total = both + float((exact * change * own).sum()), total + float((exact * own * own).sum())
        changes.append(change)
        added.append(own)
        sizes.append(float(before.norm() + after.norm()))
    factor, step = both / max(total, 1e-30), torch.finfo(stream.dtype).eps
    # A few values may be so large (massive activations) that rounding takes more than a layer adds to them.
    near = [1e-3 * float(change.norm()) + step * size for change, size in zip(changes, sizes, strict=True)]
    off = [float((change - factor * own).norm()) for change, own in zip(changes, added, strict=True)]
    return factor if all(one <= most for one, most in zip(off, near, strict=True)) else None
