"""Times of a single layer, cut to several sizes, on this device."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.architectures.lineage import LAYER_UNITS, Counts, LayerPlan
from distill_llm.measuring.clocks import Clock
from distill_llm.measuring.counting import full_length_inputs
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import PruningPlan, full_plan
from distill_llm.pruning.planning.budgets import inner_kinds
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.pruning.units.sizes import counts_of, hidden_size

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
    """Index of the layer with the most weights."""
    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers_of(model)]
    return sizes.index(max(sizes))


def timed_kinds() -> list[str]:
    """The kinds of units that layers are cut by, in the order of a row of times: those within others come first."""
    inner = inner_kinds()
    return [*inner, *(kind for kind in LAYER_UNITS if kind not in inner)]


def layer_times(model: PreTrainedModel, batch_size: int, sequence_length: int, clock: Clock) -> list[list[float]]:
    """Rows of (hidden, units of each of `timed_kinds`, milliseconds): the model's largest layer, cut to several sizes."""
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
            rows.append([hidden, *(counts[kind] for kind in timed_kinds()), milliseconds * ratio])
    return rows


def _grid(whole: Counts) -> list[Counts]:
    """The whole layer with fewer units of one kind; of a kind within another (queries), with fewer in every one of these."""
    inner, found = inner_kinds(), []
    for kind in KINDS:
        if kind in inner and whole[kind]:
            each = whole[kind] // whole[inner[kind]]
            found += [{**whole, kind: whole[inner[kind]] * count} for count in (max(1, each // 2), 1)]
        elif kind in LAYER_UNITS and kind not in inner:
            within = {k: whole[k] // whole[kind] for k, around in inner.items() if around == kind and whole[kind]}
            for count in (round(share * whole[kind]) for share in SHARES):
                found.append({**whole, kind: count} | {k: count * each for k, each in within.items()})
    return [each for i, each in enumerate(found) if each not in found[:i]]


def layer_run(
    model: PreTrainedModel, index: int, counts: Counts, hidden: int, batch_size: int, sequence_length: int
) -> LayerRun:
    """The layer cut to these counts, and the inputs that its model hands it for the batch."""
    before, inner = counts_of(model)[index], inner_kinds()
    row = LayerPlan(index, units={kind: range(counts[kind]) for kind in counts if kind not in inner})
    for kind, around in inner.items():
        if counts[kind] < row.counts(before)[kind]:
            each, had = counts[kind] // counts[around], before[kind] // before[around]
            kept = [unit * had + j for unit in range(counts[around]) for j in range(each)]
            row = LayerPlan(index, units={**row.units, kind: kept})
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
