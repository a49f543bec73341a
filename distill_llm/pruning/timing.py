"""Taking times on this device: of single layers cut to several sizes, and of whole models side by side."""

import inspect
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.counting import evaluating, full_length_inputs
from distill_llm.pruning.families import family_of, layers_of
from distill_llm.pruning.modeling_pruned import Sizes, all_queries
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan
from distill_llm.pruning.structure import head_size_of, hidden_size, sizes_of
from distill_llm.pruning.surgery import prune

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class LayerRun:
    """A layer of `sizes` in a model with `hidden` channels, with the inputs that the model hands it; call it to run it once."""

    sizes: Sizes
    hidden: int
    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    @torch.inference_mode()
    def __call__(self) -> Any:
        return self.layer(*self.args, **self.kwargs)


Clock = Callable[[Callable[[], Any], Callable[[], Any]], tuple[float, float]]
"""Of two things to run: the seconds that the first takes, and how many times as long the second takes."""
Measure = Callable[[PreTrainedModel, PreTrainedModel], float]
"""How many times as long the first model's forward pass takes as the second's."""


def relative_latency(
    model: PreTrainedModel, other: PreTrainedModel, batch_size: int = 32, sequence_length: int = 64
) -> float:
    """How many times as long a forward pass of `model` takes as one of `other`: the median over pairs that take turns."""
    inputs = [full_length_inputs(each, batch_size, sequence_length) for each in (model, other)]
    with evaluating(model), evaluating(other):
        return on_device(other.device)(lambda: other(**inputs[1]), lambda: model(**inputs[0]))[1]


def on_device(device: torch.device, fewest: int = 11, most: int = 101, seconds: float = 0.5) -> Clock:
    """A clock for things that run on a device: between `fewest` and `most` pairs, about `seconds` of them, after a warm-up.

    The two take turns, and which goes first changes every time, so that a slow moment of the machine hits both.
    """

    def run(call: Callable[[], Any]) -> float:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - start

    def clock(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
        with torch.inference_mode():
            for _ in range(3):
                once = run(first) + run(second)
            times = []
            for repeat in range(min(most, max(fewest, int(seconds / once)))):
                times.append((run(first), run(second)) if repeat % 2 else (run(second), run(first))[::-1])
        return statistics.median(a for a, _ in times), statistics.median(b / a for a, b in times)

    return clock


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def largest_layer(model: PreTrainedModel) -> int:
    """Index of the layer with the most weights, about."""
    sizes = sizes_of(model)
    return max(range(len(sizes)), key=lambda i: sizes[i].queries * 4 * head_size_of(model) + 3 * sizes[i].neurons)


def layer_times(model: PreTrainedModel, batch_size: int, sequence_length: int, clock: Clock) -> list[list[float]]:
    """(hidden, queries, groups, neurons, milliseconds) of the model's largest layer, cut to several sizes."""
    index, width = largest_layer(model), hidden_size(model)
    whole = sizes_of(model)[index]
    dense = layer_run(model, index, whole, width, batch_size, sequence_length)
    rows, milliseconds = [], None
    for hidden in dict.fromkeys((width, width if family_of(model).anchored else max(1, width // 2))):
        for sizes in _grid(whole):
            run = dense if (sizes, hidden) == (whole, width) else None
            run = run or layer_run(model, index, sizes, hidden, batch_size, sequence_length)
            seconds, ratio = clock(dense, run)
            milliseconds = 1e3 * seconds if milliseconds is None else milliseconds
            rows.append([hidden, *sizes, milliseconds * ratio])
    return rows


def _grid(whole: Sizes) -> list[Sizes]:
    """The whole layer with fewer heads, or fewer neurons, or fewer queries in every group."""
    shared = whole.queries // whole.groups if whole.groups else 1
    heads = [round(share * whole.groups) for share in SHARES]
    found = [Sizes(count * shared, count, whole.neurons) for count in heads]
    found += (
        [whole._replace(queries=whole.groups * count) for count in (max(1, shared // 2), 1)] if whole.groups else []
    )
    found += [whole._replace(neurons=round(share * whole.neurons)) for share in SHARES]
    return list(dict.fromkeys(found))


def layer_run(
    model: PreTrainedModel, index: int, sizes: Sizes, hidden: int, batch_size: int, sequence_length: int
) -> LayerRun:
    """The layer cut to these sizes, and the inputs that its model hands it for the batch."""
    before, heads = sizes_of(model)[index], tuple(range(sizes.groups))
    queries = None
    if sizes.queries < len(all_queries(heads, before)):
        each, shared = sizes.queries // sizes.groups, before.queries // before.groups
        queries = tuple(group * shared + i for group in heads for i in range(each))
    channels = None if hidden == hidden_size(model) else tuple(range(hidden))
    row = LayerPlan(index, heads, tuple(range(sizes.neurons)), queries)
    base: Any = model.base_model
    rows = (*full_plan(model).layers[: int(family_of(model).anchored and index > 0)], row)
    small = prune(base, PruningPlan(model.config.model_type, rows, hidden=channels)).eval()
    layer, caught = layers_of(small)[-1], []
    handle = layer.register_forward_pre_hook(lambda m, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    inputs: dict[str, Any] = full_length_inputs(small, batch_size, sequence_length)
    if "use_cache" in inspect.signature(small.forward).parameters:
        inputs["use_cache"] = False
    with torch.inference_mode():
        small(**inputs)
    handle.remove()
    return LayerRun(sizes, hidden, layer, *caught[0])
