"""What a unit of a model costs: parameters, FLOPs or memory."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.lineage import LAYER_UNITS
from distill_llm.architectures.modeling_pruned import hidden_dims, layer_axes, layer_prefix
from distill_llm.common.errors import InputError, one_of
from distill_llm.pruning.units.kind import Line, Load
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.pruning.units.sizes import _family, counts_of, head_size_of, hidden_size

COSTS = ("params", "flops", "memory")


@dataclass(frozen=True)
class Costs:
    """What a unit of each kind in a layer costs, and the rest of a layer, each as (slope, constant).

    A cost is slope x channels of the residual stream + constant.

    Attributes:
        name: what is counted.
        hidden: channels of the residual stream in the model that the costs were made for.
        units: the costs by kind of unit (`LAYER_UNITS`).
        rest: the cost of a layer without any units.
        held: by kind, what a unit costs beside that in each layer of the model; a kind that is not there costs nothing more.
    """

    name: str
    hidden: int
    units: Mapping[str, Line]
    rest: Line
    held: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def at(self, kind: str, hidden: int | None = None, layer: int = 0) -> float:
        """Cost of a unit in a layer of the model, with so many channels in the residual stream."""
        return self._on(self.units[kind], hidden) + (self.held[kind][layer] if kind in self.held else 0.0)

    def _on(self, line: Line, hidden: int | None) -> float:
        return line[0] * (self.hidden if hidden is None else hidden) + line[1]

    def channel(self, counts: Iterable[Mapping[str, float]]) -> float:
        """Cost of one channel of the residual stream through layers with so many units of every kind."""
        return self.of(counts_ := list(counts), 1) - self.of(counts_, 0)

    def of(
        self, counts: Iterable[Mapping[str, float]], hidden: int | None = None, layers: Iterable[int] | None = None
    ) -> float:
        """Cost of layers with so many units of every kind; `layers`: which of the model's, by default one after another."""
        units, rest = {kind: self._on(line, hidden) for kind, line in self.units.items()}, self._on(self.rest, hidden)
        counts, total = list(counts), 0.0
        for row, layer in zip(counts, range(len(counts)) if layers is None else layers, strict=True):
            cost = 0.0
            for kind, each in units.items():
                cost += row[kind] * (each + (self.held[kind][layer] if kind in self.held else 0.0))
            total += cost + rest
        return total


def unit_costs(model: PreTrainedModel, cost: str = "params", batch_size: int = 32, sequence_length: int = 64) -> Costs:
    """What a unit of every kind in a layer costs, and the rest of a layer.

    Args:
        cost: "params"; "flops" (2 x multiply-adds, per token of the batch); or "memory" (bytes of the weights, and of the keys
            and values cached for the batch, in the model's precision).
        batch_size, sequence_length: of the batch (B, T).

    Raises:
        InputError: for another `cost`.
    """
    if cost not in COSTS:
        raise InputError("cost", cost, one_of(COSTS, cost))
    cached = cached_tokens(model, batch_size, sequence_length) if cost == "memory" else []
    load = Load(model.config, _family(model), head_size_of(model), batch_size, sequence_length, cached)
    kinds, hidden = [kind for name, kind in KINDS.items() if name in LAYER_UNITS], hidden_size(model)
    if cost == "flops":
        return Costs("FLOPs", hidden, {kind.name: kind.flops(load) for kind in kinds}, (0.0, 0.0))
    width = torch.finfo(model.dtype).bits / 8 if cost == "memory" else 1.0
    found = {part: (slope * width, constant * width) for part, (slope, constant) in _weights(model, load).items()}
    units, rest = {kind.name: found[LAYER_UNITS[kind.name].letter] for kind in kinds}, found[""]
    if cost == "params":
        return Costs("parameters", hidden, units, rest)
    held = {kind.name: [count * width for count in counts] for kind in kinds if (counts := kind.held(load))}
    return Costs("bytes", hidden, units, rest, held)


def _weights(model: PreTrainedModel, load: Load) -> dict[str, Line]:
    """Weights of a unit by the letter of its kind, and under "" those of a layer without units, as (slope, constant).

    Counted from the weights themselves, over all layers: biases are not everywhere. Apart: what the residual stream spans.
    """
    totals = {letter: [0.0, 0.0] for letter in (*(unit.letter for unit in LAYER_UNITS.values()), "")}
    counts, hidden = counts_of(model), hidden_size(model)
    spans, prefix = hidden_dims(model), layer_prefix(model)
    for index, (layer, has) in enumerate(zip(layers_of(model), counts, strict=True)):
        channels = {
            unit.letter: has[kind] * (load.head_size if unit.by_head else 1) for kind, unit in LAYER_UNITS.items()
        } | {"": 1}
        axes = layer_axes(layer, load.family)
        for name, parameter in layer.named_parameters():
            layout = next((axes[path][1] for path in axes if name == path or name.startswith(path + ".")), "")
            parts = [part.strip("()/[]") for part in layout.split()] or [""]
            whole = sum(channels[part] for part in parts) or 1
            for part in parts:
                totals[part][f"{prefix}{index}.{name}" not in spans] += parameter.numel() * channels[part] / whole
    units = {unit.letter: sum(each[kind] for each in counts) for kind, unit in LAYER_UNITS.items()} | {"": len(counts)}
    return {part: (a / hidden / max(units[part], 1), b / max(units[part], 1)) for part, (a, b) in totals.items()}


def cached_tokens(model: PreTrainedModel, batch_size: int, sequence_length: int) -> list[int]:
    """Tokens of a batch (B, T) whose keys and values every layer holds while the model generates.

    Empty for encoders, and under heads that generate nothing; a layer that attends to a window holds no more of a sequence.
    """
    encoder = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encoder or not (model.can_generate() or model is model.base_model):
        return []
    windows = [layer.get_max_length() for layer in DynamicCache(config=model.config).layers]  # -1: has none
    return [batch_size * (min(window, sequence_length) if window > 0 else sequence_length) for window in windows]
