"""Taking times on this device: of single layers cut to several sizes, and of whole models side by side."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.architectures.modeling_pruned import Sizes, all_queries
from distill_llm.measuring.clocks import Clock
from distill_llm.measuring.counting import full_length_inputs
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan
from distill_llm.pruning.units.sizes import head_size_of, hidden_size, sizes_of

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
