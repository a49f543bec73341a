"""Sums over the weights that make and use a unit: magnitudes, which need no data, and weights times their gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import dims_of, family_of, layers_of, width_of
from distill_llm.architectures.lineage import LAYER_UNITS, Counts, kinds_of
from distill_llm.architectures.modeling_pruned import hidden_dims, layer_axes, layer_prefix
from distill_llm.pruning.units.sizes import counts_of

WeightSums = torch.Tensor
"""(3, units): sums over weights of their squares, their absolute values, and |weight x gradient|."""
Gradients = Mapping[str, torch.Tensor]
"""The gradient of the loss by the name of a parameter of the model, in its shape."""


@dataclass(frozen=True)
class UnitWeights:
    """Sums over weights: per layer by kind of unit, and per channel of the residual stream (empty if not asked for). Biases and
    norms do not count."""

    layers: tuple[dict[str, WeightSums], ...]
    hidden: WeightSums


def unit_weights(
    model: PreTrainedModel, hidden: bool = False, gradients: Gradients = MappingProxyType({})
) -> UnitWeights:
    """Sums over the rows that make each unit and the columns that use it; without gradients the third is 0."""
    family, head_size = family_of(model), dims_of(model.config).head_size
    rows = []
    for number, (layer, counts) in enumerate(zip(layers_of(model), counts_of(model), strict=True)):
        totals = {kind: torch.zeros(3, count) for kind, count in counts.items()}
        for name, (dim, layout) in layer_axes(layer, family).items():
            parameter = None if layout.endswith("[]") else layer.get_parameter(name)
            if parameter is None or parameter.dim() < 2 or layout.endswith("/") or not parameter.numel():
                continue
            sums = _along(parameter, dim, gradients.get(f"{layer_prefix(model)}{number}.{name}"))
            for kind, total in totals.items():
                if counts[kind]:
                    total += sums[:, _channels(layout, kind, counts, head_size)].sum(-1)
        rows.append(totals)
    return UnitWeights(tuple(rows), _hidden(model, gradients) if hidden else torch.zeros(3, 0))


def _along(parameter: torch.Tensor, dim: int, gradient: torch.Tensor | None) -> WeightSums:
    """(3, n): sums over entries along the other dimensions."""
    entries = parameter.detach().float().transpose(0, dim).flatten(1)
    sums = [entries.square().sum(1), entries.abs().sum(1), torch.zeros(len(entries), device=entries.device)]
    if gradient is not None:
        sums[2] = (entries * gradient.to(entries.device).transpose(0, dim).flatten(1)).abs().sum(1)
    return torch.stack(sums).cpu()


def _channels(layout: str, kind: str, counts: Counts, head_size: int) -> torch.Tensor:
    """(units, m): the channels of each unit of a kind, with those of the units inside it, in a dimension of this layout.

    A query has its own channels alone: the key and value are the group's. m is 0 where the layout has no such units.
    """
    if layout.startswith("(") and kind in ("heads", "queries"):  # group by group: its queries, then its key and value
        groups, queries = counts["heads"], counts["queries"]
        each = torch.arange((queries + 2 * groups) * head_size).view(groups, -1)
        return each if kind == "heads" else each[:, : queries // groups * head_size].reshape(queries, -1)
    found, offset = [], 0
    for part in layout.strip("()").split():
        kinds = kinds_of(part)
        channels = counts[kinds[0]] * (head_size if LAYER_UNITS[kinds[0]].by_head else 1)
        if kind in kinds:
            found.append(torch.arange(channels).view(counts[kind], -1) + offset)
        offset += channels
    return torch.cat(found, 1) if found else torch.zeros(counts[kind], 0, dtype=torch.long)


def _hidden(model: PreTrainedModel, gradients: Gradients) -> WeightSums:
    """Sums over the matrices of the layers. Embeddings and heads are left out, as in the cost that `keep` is a share of."""
    prefix, total = layer_prefix(model), torch.zeros(3, width_of(model))
    for name, dims in hidden_dims(model).items():
        parameter = model.get_parameter(name)
        if name.startswith(prefix) and parameter.dim() > 1 and parameter.numel():
            total += _along(parameter, dims[0], gradients.get(name))
    return total
