"""Magnitudes: sums over the weights that make and use a unit. They need no data."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import dims_of, family_of, layers_of, width_of
from distill_llm.architectures.lineage import LAYER_UNITS, Counts, kinds_of
from distill_llm.architectures.modeling_pruned import hidden_dims, layer_axes, layer_prefix
from distill_llm.pruning.units.sizes import counts_of

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class UnitWeights:
    """Sums of squared and of absolute weights: per layer by kind of unit, and per channel of the residual stream
    (empty if not asked for). Biases and norms do not count."""

    layers: tuple[dict[str, Pair], ...]
    hidden: Pair


def unit_weights(model: PreTrainedModel, hidden: bool = False) -> UnitWeights:
    """Sums over the rows that make each unit and the columns that use it."""
    family, head_size = family_of(model), dims_of(model.config).head_size
    rows = []
    for layer, counts in zip(layers_of(model), counts_of(model), strict=True):
        totals = {kind: torch.zeros(2, count) for kind, count in counts.items()}
        for name, (dim, layout) in layer_axes(layer, family).items():
            parameter = None if layout.endswith("[]") else layer.get_parameter(name)
            if parameter is None or parameter.dim() < 2 or layout.endswith("/") or not parameter.numel():
                continue
            sums = _along(parameter, dim)
            for kind, total in totals.items():
                if counts[kind]:
                    total += sums[:, _channels(layout, kind, counts, head_size)].sum(-1)
        rows.append({kind: (total[0], total[1]) for kind, total in totals.items()})
    return UnitWeights(tuple(rows), _hidden(model) if hidden else (torch.zeros(0), torch.zeros(0)))


def _along(parameter: torch.Tensor, dim: int) -> torch.Tensor:
    """(2, n): sums of squared and of absolute entries along the other dimensions."""
    entries = parameter.detach().float().transpose(0, dim).flatten(1)
    return torch.stack([entries.square().sum(1), entries.abs().sum(1)]).cpu()


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


def _hidden(model: PreTrainedModel) -> Pair:
    """Sums over the matrices of the layers. Embeddings and heads are left out, as in the cost that `keep` is a share of."""
    prefix, total = layer_prefix(model), torch.zeros(2, width_of(model))
    for name, dims in hidden_dims(model).items():
        parameter = model.get_parameter(name)
        if name.startswith(prefix) and parameter.dim() > 1 and parameter.numel():
            total += _along(parameter, dims[0])
    return total[0], total[1]
