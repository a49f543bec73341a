"""Where linears add to the residual stream: those of a cut model that are fitted in order, and the dense stream between them.

The dense stream has stations: 2 i before layer i, 2 i + 1 between the two linears of layer i that add to the stream.
"""

from collections.abc import Container
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.pruning.compensation.layer_runs import LayerRuns, Streams, noted, residual_factor
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.units.sizes import linear, weight_of

Linears = list[list[nn.Linear | Conv1D]]
"""Of every layer, the two linears that add to the stream, in order."""


@dataclass(frozen=True)
class Fitted:
    """A linear of the cut model that keeps inputs, and its place in both models.

    Attributes:
        layer: where it is in the cut model.
        module: the linear.
        start, end: the dense stations where it begins, and where the next one does.
        constant: (H,), what the cut model's linears between this one and the next add without reading anything: their biases.
        whole: whether nothing is removed from it, or between it and the next.
    """

    layer: int
    module: nn.Linear | Conv1D
    start: int
    end: int
    constant: torch.Tensor
    whole: bool


def ffn_first(model: PreTrainedModel, plan: PruningPlan) -> set[int]:
    """The layers whose FFN counts as the first to add to the stream: it takes over a removed attention beside it."""
    return {row.source for row in plan.layers if family_of(model).parallel and not row.heads}


def adding(model: PreTrainedModel, swapped: Container[int]) -> Linears:
    """The linears of every layer that add to the stream, in order.

    Args:
        swapped: the layers whose FFN is the first.
    """
    family = family_of(model)
    every = [[linear(layer, path) for path in (family.attention_out, family.ffn_out)] for layer in layers_of(model)]
    return [pair[::-1] if index in swapped else pair for index, pair in enumerate(every)]


def fitted_linears(own: Linears, dense: Linears, plan: PruningPlan) -> list[Fitted]:
    """The linears of a cut model that are fitted, in order.

    Args:
        own, dense: those of the cut and of the dense model that add to the stream.
    """
    widths = [weight_of(module).shape[1] for pair in dense for module in pair]  # by station
    places = [
        (index, 2 * row.source + place, module)
        for index, (row, pair) in enumerate(zip(plan.layers, own, strict=True))
        for place, module in enumerate(pair)
    ]
    found: list[Fitted] = []
    end = len(widths)
    constant = torch.zeros(())
    for index, station, module in reversed(places):
        inputs = weight_of(module).shape[1]
        if not inputs:
            constant = constant + (0.0 if module.bias is None else module.bias.detach().cpu())
            continue
        whole = inputs == widths[station] and not any(widths[station + 1 : end])
        found.append(Fitted(index, module, station, end, constant, whole))
        end, constant = station, torch.zeros(())
    if found and any(widths[: found[-1].start]):  # what is removed before the first
        found[-1] = replace(found[-1], whole=False)
    return found[::-1]


class DenseStream:
    """The dense model's residual stream, layer by layer.

    Args:
        runs: the dense model's layers.
        adding: its linears that add to the stream.
    """

    def __init__(self, runs: LayerRuns, adding: Linears):
        self.runs, self.adding, self.factor = runs, adding, residual_factor(runs.model.config)
        self._at: dict[int, Streams] = {0: runs.first}
        runs.first = []  # so that it is freed once it is passed

    def between(self, start: int, end: int) -> tuple[Streams, Streams]:
        """The stream at two stations, in ascending order over calls; what lies before or between is freed.

        The caller may empty the list of the first one: it is not asked for again once the second one was.
        """
        last = max(self._at)
        self._at = {place: its for place, its in self._at.items() if place >= start or place == last}
        for station in (start, end):
            while station not in self._at:
                self._advance(max(self._at) // 2, start, end)
        return self._at[start], self._at[end]

    def _advance(self, index: int, start: int, end: int) -> None:
        """Run a layer, from the last station to the one after it; the stations on the way are kept if they are named."""
        station = 2 * index
        streams = list(self._at[station]) if station in (start, end) else self._at.pop(station)
        between: Streams = []
        after: Streams = []
        with noted(self.adding[index][:1]) as found, self.runs.layer(index) as run:
            for number in range(len(streams)):
                stream = streams.pop(0)  # freed as soon as it is read
                after.append(run(number, stream).cpu())
                if station + 1 in (start, end):
                    between.append(stream + self.factor * found[0].view_as(stream).cpu())
        if station + 1 in (start, end):
            self._at[station + 1] = between
        self._at[station + 2] = after
