"""Sizes of a model's layers, what a unit costs, and views of a layer's weights by unit."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.errors import InputError, one_of
from distill_llm.pruning.modeling_pruned import (
    Dims,
    Family,
    LayerLineage,
    Sizes,
    dims_of,
    family_of,
    hidden_axes,
    inputs_of,
    kept_channels,
    layer_axes,
    layer_prefix,
    layer_sizes,
    layers_of,
    lineage_of,
    outputs_of,
)

COSTS = ("params", "flops", "memory")


class LayerShape(NamedTuple):
    """Numbers of heads (KV groups), FFN neurons and query heads of a layer; `queries` None: as many as heads."""

    heads: int
    neurons: int
    queries: int | None = None


def linear(layer: nn.Module, path: str) -> nn.Linear | Conv1D:
    """The linear at a path of the family's row (GPT-2's are Conv1D: its weight is transposed)."""
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear | Conv1D), f"{path} is {type(found).__name__}"
    return found


def weight_of(module: nn.Linear | Conv1D) -> torch.Tensor:
    """The weight as (outputs, inputs), a view."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def sizes_of(model: PreTrainedModel) -> list[Sizes]:
    """Query heads, groups and neurons of every layer, as they are now.

    Raises:
        InputError: for a quantized model.
    """
    family, dims = _family(model), dims_of(model.config)
    return [layer_sizes(layer, family, dims) for layer in layers_of(model)]


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Heads, neurons and queries of every layer, as they are now."""
    return [
        LayerShape(size.groups, size.neurons, None if size.queries == size.groups else size.queries)
        for size in sizes_of(model)
    ]


def _family(model: PreTrainedModel) -> Family:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise InputError(
            "model", "a quantized model", "its full-precision original: prune first, then quantize the student"
        )
    return family_of(model)


def hidden_size(model: PreTrainedModel) -> int:
    """Channels of the residual stream, as they are now."""
    return outputs_of(linear(layers_of(model)[0], _family(model).ffn_out))


@dataclass(frozen=True)
class Costs:
    """What a query head, the key and value of a group, a neuron and the rest of a layer cost, each as (slope, constant).

    A cost is slope x channels of the residual stream + constant; `hidden` is their number in the model it was made for, and
    `shared` how many queries share a group there.
    """

    name: str
    hidden: int
    shared: int
    query: tuple[float, float]
    group: tuple[float, float]
    neuron_: tuple[float, float]
    rest_: tuple[float, float]

    def _at(self, pair: tuple[float, float], hidden: int | None) -> float:
        return pair[0] * (self.hidden if hidden is None else hidden) + pair[1]

    def head_at(self, hidden: int | None = None) -> float:
        """Cost of a group with all its queries."""
        return self._at(self.group, hidden) + self.shared * self._at(self.query, hidden)

    def query_at(self, hidden: int | None = None) -> float:
        """Cost of a query head alone."""
        return self._at(self.query, hidden)

    def neuron_at(self, hidden: int | None = None) -> float:
        """Cost of a neuron."""
        return self._at(self.neuron_, hidden)

    @property
    def head(self) -> float:
        """`head_at` the model's own width."""
        return self.head_at()

    @property
    def neuron(self) -> float:
        """`neuron_at` the model's own width."""
        return self.neuron_at()

    def channel(self, shapes: Iterable[tuple]) -> float:
        """Cost of one channel of the residual stream through layers of (heads, neurons[, queries])."""
        return self.of(shapes_ := list(shapes), 1) - self.of(shapes_, 0)

    def of(self, shapes: Iterable[tuple], hidden: int | None = None) -> float:
        """Cost of layers of (heads, neurons[, queries])."""
        query, group = self._at(self.query, hidden), self._at(self.group, hidden)
        neuron, rest = self._at(self.neuron_, hidden), self._at(self.rest_, hidden)
        total = 0.0
        for heads, neurons, *more in shapes:
            queries = more[0] if more and more[0] is not None else heads * self.shared
            total += queries * query + heads * group + neurons * neuron + rest
        return total


def unit_costs(model: PreTrainedModel, cost: str = "params", sequence_length: int = 128) -> Costs:
    """Cost of a head, a neuron and the rest of a layer.

    Args:
        cost: "params"; "flops" (2 x multiply-adds, per token of a sequence of `sequence_length` tokens); or "memory" (bytes of the
            weights, and of the keys and values cached for `sequence_length` tokens, in the model's precision).

    Raises:
        InputError: for another `cost`.
    """
    if cost not in COSTS:
        raise InputError("cost", cost, one_of(COSTS, cost))
    family, dims, layers, sizes = _family(model), dims_of(model.config), layers_of(model), sizes_of(model)
    hidden = hidden_size(model)
    index = next((i for i, size in enumerate(sizes) if size.queries), 0)
    layer, size, head_size = layers[index], sizes[index], dims.head_size
    shared = size.queries // size.groups if size.groups else 1
    if cost == "flops":
        inputs = sum(layout.count("n") for path, layout in family.ffn_in.items())
        into = 2.0 * head_size
        return Costs(
            "FLOPs", hidden, shared, (2 * into, 4.0 * sequence_length * head_size), (2 * into, 0), (2.0 * (inputs + 1), 0), (0, 0)
        )
    # Counted from the weights themselves: biases are not everywhere.
    sums = {"q": [0.0, 0.0], "kv": [0.0, 0.0], "n": [0.0, 0.0], "": [0.0, 0.0]}
    axes, wide = layer_axes(layer, family), _hidden_parameters(model, index)
    for name, parameter in layer.named_parameters():
        of_hidden = name in wide
        own = next((one for one in axes if name == one or name.startswith(one + ".")), None)
        parts = [part.strip("()/[]") for part in axes[own][1].split()] if own else [""]
        counts = {"q": size.queries * head_size, "kv": size.groups * head_size, "n": size.neurons, "": 1}
        whole = sum(counts[part] for part in parts)
        for part in parts:
            share = parameter.numel() * counts[part] / whole if whole else 0.0
            if own and axes[own][1].endswith("[]"):
                share = parameter.numel()
            sums[part][not of_hidden] += share
    per = {"q": size.queries, "kv": size.groups, "n": size.neurons, "": 1}
    pair = {part: (s / max(per[part], 1) / hidden, c / max(per[part], 1)) for part, (s, c) in sums.items()}
    if cost == "memory":
        width = torch.finfo(model.dtype).bits / 8
        pair = {part: (s * width, c * width) for part, (s, c) in pair.items()}
        pair["kv"] = (pair["kv"][0], pair["kv"][1] + 2 * head_size * sequence_length * width)
    return Costs("parameters" if cost == "params" else "bytes", hidden, shared, pair["q"], pair["kv"], pair["n"], pair[""])


def _hidden_parameters(model: PreTrainedModel, index: int) -> set[str]:
    """Names, within layer `index`, of the parameters that the residual stream's channels span once."""
    lineage = lineage_of(model)
    source = lineage[index].source if lineage else index
    prefix = f"{layer_prefix(model)}{source}."
    return {name.removeprefix(prefix) for name in hidden_axes(model) if name.startswith(prefix)}


def weight_norms(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per layer, the sum of squared weights of every head (group), of every neuron and of every query head alone."""
    family, dims = _family(model), dims_of(model.config)
    norms = []
    for layer, size in zip(layers_of(model), sizes_of(model), strict=True):
        shared = size.queries // size.groups if size.groups else 0
        heads, neurons, queries = torch.zeros(size.groups), torch.zeros(size.neurons), torch.zeros(size.queries)
        for name, (dim, layout) in layer_axes(layer, family).items():
            parameter = None if layout.endswith("[]") else layer.get_parameter(name)
            if parameter is None or parameter.dim() < 2 or not parameter.numel():
                continue
            squares = parameter.detach().float().square().sum(1 - dim).cpu()
            if "n" in layout:
                neurons += squares.view(-1, size.neurons).sum(0)
                continue
            for group in range(size.groups):
                mine = range(group * shared, (group + 1) * shared)
                row = LayerLineage(0, (group,), (), tuple(mine))
                heads[group] += squares[kept_channels(layout, row, size, dims.head_size)].sum()
                for query in mine if "q" in layout else ():
                    alone = kept_channels(layout, row._replace(heads=(), queries=(query,)), size, dims.head_size)
                    if layout.startswith("("):  # a group keeps its key and value, which are no query's own
                        start = group * (shared + 2) + query - group * shared
                        alone = torch.arange(start * dims.head_size, (start + 1) * dims.head_size)
                    queries[query] += squares[alone].sum()
        norms.append((heads, neurons, queries))
    return norms


def head_size_of(model: PreTrainedModel) -> int:
    """Channels per head, of the model whether pruned or not."""
    return dims_of(model.config).head_size


__all__ = ["COSTS", "Costs", "Dims", "LayerShape", "head_size_of", "hidden_size", "inputs_of", "layer_shapes", "linear", "sizes_of", "unit_costs", "weight_norms", "weight_of"]
