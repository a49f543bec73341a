"""Where linears add to the residual stream: those of a cut model that are fitted in order, and the dense stream between them.

The dense stream has stations: 2 i before layer i, 2 i + 1 between the two linears of layer i that add to the stream.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.pruning.compensation.layer_runs import LayerRuns, Streams, noted
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.units.sizes import linear, weight_of


@dataclass(frozen=True)
class Fitted:
    """A linear of the cut model that keeps inputs, and its place in both models.

    Attributes:
        layer, path: where it is in the cut model.
        module: the linear.
        before: the linear of the same layer whose output the stream has before this one; None where this is the first.
        start, end: the dense stations where it begins, and where the next one does.
        constant: (H,), what the cut model's linears between this one and the next add without reading anything: their biases.
        whole: whether nothing is removed from it, or between it and the next.
    """

    layer: int
    path: str
    module: nn.Linear | Conv1D
    before: nn.Linear | Conv1D | None
    start: int
    end: int
    constant: torch.Tensor
    whole: bool


def ffn_first(model: PreTrainedModel, plan: PruningPlan) -> set[int]:
    """The layers whose FFN counts as the first to add to the stream: it takes over a removed attention beside it."""
    return {row.source for row in plan.layers if family_of(model).parallel and not row.heads}


def fitted_linears(student: PreTrainedModel, model: PreTrainedModel, plan: PruningPlan) -> list[Fitted]:
    """The linears that are fitted, in order."""
    family, swapped = family_of(model), ffn_first(model, plan)
    paths = (family.attention_out, family.ffn_out)
    widths: list[int] = []  # by station, of the dense model
    for index, layer in enumerate(layers_of(model)):
        order = paths[::-1] if index in swapped else paths
        widths += [weight_of(linear(layer, path)).shape[1] for path in order]
    every: list[
        tuple[int, int, int, str, nn.Linear | Conv1D]
    ] = []  # of the cut model: layer, place in it, station, path, linear
    for index, (row, layer) in enumerate(zip(plan.layers, layers_of(student), strict=True)):
        for place, path in enumerate(paths[::-1] if row.source in swapped else paths):
            every.append((index, place, 2 * row.source + place, path, linear(layer, path)))
    found: list[Fitted] = []
    end = len(widths)
    constant = torch.zeros(())
    for number, (index, place, station, path, module) in reversed(list(enumerate(every))):
        inputs = weight_of(module).shape[1]
        if not inputs:
            constant = constant + (0.0 if module.bias is None else module.bias.detach().cpu())
            continue
        whole = inputs == widths[station] and not any(widths[station + 1 : end])
        before = every[number - 1][-1] if place else None
        found.append(Fitted(index, path, module, before, station, end, constant, whole))
        end, constant = station, torch.zeros(())
    if found and any(widths[: found[-1].start]):  # what is removed before the first
        found[-1] = replace(found[-1], whole=False)
    return found[::-1]


class DenseStream:
    """The dense model's residual stream, layer by layer.

    Args:
        runs: the dense model's layers.
        swapped: see `ffn_first`.
        factor: what the outputs of linears are multiplied by (see `residual_factor`).
    """

    def __init__(self, runs: LayerRuns, swapped: set[int], factor: float):
        self.runs, self.swapped, self.factor = runs, swapped, factor
        self._at: dict[int, Streams] = {0: runs.first}
        runs.first = []  # so that it is freed once it is passed

    def between(self, start: int, end: int) -> tuple[Streams, Streams]:
        """The stream at two stations, in ascending order over calls; what lies before or between is freed."""
        last = max(self._at)
        self._at = {place: its for place, its in self._at.items() if place >= start or place == last}
        for station in (start, end):
            while station not in self._at:
                self._advance(max(self._at) // 2, start, end)
        return self._at[start], self._at[end]

    def _advance(self, index: int, start: int, end: int) -> None:
        """Run a layer, from the last station to the one after it; the stations on the way are kept if they are named."""
        family, layer, station = family_of(self.runs.model), self.runs.layers[index], 2 * index
        first = linear(layer, family.ffn_out if index in self.swapped else family.attention_out)
        streams = list(self._at[station]) if station in (start, end) else self._at.pop(station)
        between: Streams = []
        after: Streams = []
        with noted(leaving=[first]) as found, self.runs.layer(index) as run:
            for number in range(len(streams)):
                stream = streams.pop(0)  # freed as soon as it is read
                after.append(run(number, stream).cpu())
                if station + 1 in (start, end):
                    between.append(stream + self.factor * found["out"][0].view_as(stream).cpu())
        if station + 1 in (start, end):
            self._at[station + 1] = between
        self._at[station + 2] = after
