"""What a unit of a model costs: parameters, FLOPs or memory."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.lineage import LAYER_UNITS
from distill_llm.architectures.modeling_pruned import hidden_dims, layer_axes, layer_prefix
from distill_llm.common.errors import InputError, one_of
from distill_llm.pruning.units.sizes import _family, counts_of, head_size_of, hidden_size

COSTS = ("params", "flops", "memory")


@dataclass(frozen=True)
class Costs:
    """What a query head, the key and value of a group, a neuron and the rest of a layer cost, each as (slope, constant).

    A cost is slope x channels of the residual stream + constant; `hidden` is their number in the model it was made for, and
    `shared` how many queries share a group there. `cached` is what the keys and values of a group that are held cost beside
    it, per layer of that model (layers may hold windows only); empty: nothing. `by_query`: those are held for every query head.
    """

    name: str
    hidden: int
    shared: int
    query: tuple[float, float]
    group: tuple[float, float]
    neuron_: tuple[float, float]
    rest_: tuple[float, float]
    cached: tuple[float, ...] = ()
    by_query: bool = False

    def _at(self, pair: tuple[float, float], hidden: int | None) -> float:
        return pair[0] * (self.hidden if hidden is None else hidden) + pair[1]

    def group_at(self, hidden: int | None = None, layer: int = 0) -> float:
        """Cost of a group's key and value in a layer of the model."""
        return self._at(self.group, hidden) + (self.cached[layer] if self.cached and not self.by_query else 0.0)

    def query_at(self, hidden: int | None = None, layer: int = 0) -> float:
        """Cost of a query head alone in a layer of the model."""
        return self._at(self.query, hidden) + (self.cached[layer] if self.cached and self.by_query else 0.0)

    def neuron_at(self, hidden: int | None = None) -> float:
        """Cost of a neuron."""
        return self._at(self.neuron_, hidden)

    @property
    def head(self) -> float:
        """Cost of a group with all its queries in the first layer, at the model's own width."""
        return self.group_at() + self.shared * self.query_at()

    @property
    def neuron(self) -> float:
        """`neuron_at` the model's own width."""
        return self.neuron_at()

    def channel(self, counts: Iterable[Mapping[str, float]]) -> float:
        """Cost of one channel of the residual stream through layers with so many units of every kind."""
        return self.of(counts_ := list(counts), 1) - self.of(counts_, 0)

    def of(
        self, counts: Iterable[Mapping[str, float]], hidden: int | None = None, layers: Iterable[int] | None = None
    ) -> float:
        """Cost of layers with so many units of every kind; `layers`: which of the model's, by default one after another."""
        neuron, rest = (self._at(pair, hidden) for pair in (self.neuron_, self.rest_))
        counts = list(counts)
        places, total = range(len(counts)) if layers is None else layers, 0.0
        for row, layer in zip(counts, places, strict=True):
            heads, queries, neurons = row["heads"], row["queries"], row["neurons"]
            total += (
                queries * self.query_at(hidden, layer) + heads * self.group_at(hidden, layer) + neurons * neuron + rest
            )
        return total


def unit_costs(model: PreTrainedModel, cost: str = "params", batch_size: int = 32, sequence_length: int = 64) -> Costs:
    """Cost of a head, a neuron and the rest of a layer.

    Args:
        cost: "params"; "flops" (2 x multiply-adds, per token of the batch); or "memory" (bytes of the weights, and of the keys
            and values cached for the batch, in the model's precision).
        batch_size, sequence_length: of the batch (B, T).

    Raises:
        InputError: for another `cost`.
    """
    if cost not in COSTS:
        raise InputError("cost", cost, one_of(COSTS, cost))
    family, counts, hidden, head_size = _family(model), counts_of(model), hidden_size(model), head_size_of(model)
    shared = next((each["queries"] // each["heads"] for each in counts if each["heads"]), 1)
    if cost == "flops":
        rows, products, projections = position_products(model)
        scores = 4.0 * sequence_length * head_size + 2.0 * rows * products * head_size
        into, neuron = 2.0 * head_size, 2.0 + 2.0 * sum(layout.count("n") for layout in family.ffn_in.values())
        projected = rows * projections / (batch_size * sequence_length)  # once for all tokens
        each_query = (2 + projected) * into, scores
        return Costs("FLOPs", hidden, shared, each_query, (2 * into, 0.0), (neuron, 0.0), (0.0, 0.0))
    # Counted from the weights themselves, over all layers: biases are not everywhere. Apart: what the residual stream spans.
    totals = {"q": [0.0, 0.0], "kv": [0.0, 0.0], "n": [0.0, 0.0], "": [0.0, 0.0]}
    spans, prefix = hidden_dims(model), layer_prefix(model)
    for index, (layer, has) in enumerate(zip(layers_of(model), counts, strict=True)):
        channels = {"q": has["queries"] * head_size, "kv": has["heads"] * head_size, "n": has["neurons"], "": 1}
        axes = layer_axes(layer, family)
        for name, parameter in layer.named_parameters():
            layout = next((axes[path][1] for path in axes if name == path or name.startswith(path + ".")), "")
            parts = [part.strip("()/[]") for part in layout.split()] or [""]
            whole = sum(channels[part] for part in parts) or 1
            for part in parts:
                totals[part][f"{prefix}{index}.{name}" not in spans] += parameter.numel() * channels[part] / whole
    units = {unit.letter: sum(each[kind] for each in counts) for kind, unit in LAYER_UNITS.items()} | {"": len(counts)}
    width = torch.finfo(model.dtype).bits / 8 if cost == "memory" else 1.0
    each = {part: (a / hidden / max(units[part], 1), b / max(units[part], 1)) for part, (a, b) in totals.items()}
    query, group, neuron_, rest = ((slope * width, constant * width) for slope, constant in each.values())
    if cost == "params":
        return Costs("parameters", hidden, shared, query, group, neuron_, rest)
    cached = tuple(2 * head_size * tokens * width for tokens in cached_tokens(model, batch_size, sequence_length))
    return Costs("bytes", hidden, shared, query, group, neuron_, rest, cached, family.caches_queries)


def position_products(model: PreTrainedModel) -> tuple[int, int, int]:
    """Of attention with embeddings of relative positions (DeBERTa): how many there are; by how many projections of them each
    query head multiplies its queries and keys (c2p, p2c); and how many it makes. Zeros for all other families."""
    config = model.config
    if not getattr(config, "relative_attention", False):
        return 0, 0, 0
    spans = getattr(config, "position_buckets", -1), config.max_relative_positions, config.max_position_embeddings
    types = len({"c2p", "p2c"} & set(config.pos_att_type or ()))
    return 2 * next(span for span in spans if span > 0), types, 2 if getattr(config, "share_att_key", False) else types


def cached_tokens(model: PreTrainedModel, batch_size: int, sequence_length: int) -> list[int]:
    """Tokens of a batch (B, T) whose keys and values every layer holds while the model generates.

    Empty for encoders, and under heads that generate nothing; a layer that attends to a window holds no more of a sequence.
    """
    encoder = model.config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if encoder or not (model.can_generate() or model is model.base_model):
        return []
    windows = [layer.get_max_length() for layer in DynamicCache(config=model.config).layers]  # -1: has none
    return [batch_size * (min(window, sequence_length) if window > 0 else sequence_length) for window in windows]
