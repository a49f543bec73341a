"""Times of a single layer, cut to several sizes, on this device."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.architectures.lineage import Counts, LayerPlan
from distill_llm.measuring.clocks import Clock
from distill_llm.measuring.counting import full_length_inputs
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import PruningPlan, full_plan
from distill_llm.pruning.units.sizes import counts_of, head_size_of, hidden_size

SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)


@dataclass(frozen=True)
class LayerRun:
    """A layer with `counts` units in a model with `hidden` channels, and the inputs that it gets there. Call it to run it."""

    counts: Counts
    hidden: int
    layer: nn.Module
    args: tuple
    kwargs: dict[str, Any]

    @torch.inference_mode()
    def __call__(self) -> Any:
        return self.layer(*self.args, **self.kwargs)


def largest_layer(model: PreTrainedModel) -> int:
    """Index of the layer with roughly the most weights."""
    counts, size = counts_of(model), head_size_of(model)
    return max(range(len(counts)), key=lambda i: counts[i]["queries"] * 4 * size + 3 * counts[i]["neurons"])


def layer_times(model: PreTrainedModel, batch_size: int, sequence_length: int, clock: Clock) -> list[list[float]]:
    """Rows of (hidden, queries, groups, neurons, milliseconds): the model's largest layer, cut to several sizes."""
    index, width = largest_layer(model), hidden_size(model)
    whole = counts_of(model)[index]
    dense = layer_run(model, index, whole, width, batch_size, sequence_length)
    rows, milliseconds = [], None
    for hidden in dict.fromkeys((width, width if family_of(model).anchored else max(1, width // 2))):
        for counts in _grid(whole):
            run = dense if (counts, hidden) == (whole, width) else None
            run = run or layer_run(model, index, counts, hidden, batch_size, sequence_length)
            seconds, ratio = clock(dense, run)
            milliseconds = 1e3 * seconds if milliseconds is None else milliseconds
            rows.append([hidden, counts["queries"], counts["heads"], counts["neurons"], milliseconds * ratio])
    return rows


def _grid(whole: Counts) -> list[Counts]:
    """The whole layer with fewer heads, or fewer neurons, or fewer queries in every group."""
    groups = whole["heads"]
    shared = whole["queries"] // groups if groups else 1
    heads = [round(share * groups) for share in SHARES]
    found = [{**whole, "heads": count, "queries": count * shared} for count in heads]
    found += [{**whole, "queries": groups * count} for count in (max(1, shared // 2), 1)] if groups else []
    found += [{**whole, "neurons": round(share * whole["neurons"])} for share in SHARES]
    return [each for i, each in enumerate(found) if each not in found[:i]]


def layer_run(
    model: PreTrainedModel, index: int, counts: Counts, hidden: int, batch_size: int, sequence_length: int
) -> LayerRun:
    """The layer cut to these counts, and the inputs that its model hands it for the batch."""
    before, heads = counts_of(model)[index], range(counts["heads"])
    row = LayerPlan(index, heads=heads, neurons=range(counts["neurons"]))
    if counts["queries"] < row.counts(before)["queries"]:
        each, shared = counts["queries"] // counts["heads"], before["queries"] // before["heads"]
        row = LayerPlan(index, units={**row.units, "queries": [g * shared + i for g in heads for i in range(each)]})
    channels = None if hidden == hidden_size(model) else tuple(range(hidden))
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
    return LayerRun(counts, hidden, layer, *caught[0])
