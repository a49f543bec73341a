"""The residual stream's readers: which linears read which tensor, and what they take over from channels that are removed.

A channel that is removed is missing in two ways. The linears that read it lose its columns: these are folded into the kept
ones (see `compensate_linear`). And a norm over fewer channels scales, and with a mean shifts, those that are left by other
numbers than before: its own weight and bias take the mean of that.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import dims_of, family_of, layers_of, width_of
from distill_llm.architectures.lineage import LayerPlan
from distill_llm.architectures.modeling_pruned import hidden_dims, kept_channels, layer_axes, layer_prefix
from distill_llm.common.errors import InputError
from distill_llm.pruning.compensation.linear import compensate_linear
from distill_llm.pruning.statistics.moments import Moments
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.units.sizes import counts_of, weight_of


def repaired_stream(
    model: PreTrainedModel, rows: Sequence[LayerPlan], kept: torch.Tensor, statistics: Statistics
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """New weights and biases of the norms and readers of a residual stream that keeps some channels.

    Args:
        rows: what stays, a row per remaining layer.
        kept: indices (K,) of the channels that stay.
        statistics: of the model; without `hidden_moments` nothing is repaired.

    Returns:
        By the student's names: of linears the weight (outputs, K), and of both what stays of the outputs.

    Raises:
        InputError: statistics of another model.
    """
    family, dims, counts, prefix = family_of(model), dims_of(model.config), counts_of(model), layer_prefix(model)
    place, spans = {row.source: i for i, row in enumerate(rows)}, hidden_dims(model)
    modules = dict(model.named_modules())
    found: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}
    for tensor, moments in statistics.hidden_moments:
        names = [name for name in (tensor.norm, *tensor.readers) if name]
        if len(moments.mean) != width_of(model) or not modules.keys() >= set(names):
            accepted = "statistics of the model that is pruned"
            raise InputError("compensate", "statistics of a model of other sizes", accepted)
        for name in names:
            index, _, path = name.removeprefix(prefix).partition(".") if name.startswith(prefix) else ("", "", name)
            if index and int(index) not in place:
                continue
            own = f"{prefix}{place[int(index)]}.{path}" if index else name
            module: Any = modules[name]
            if name == tensor.norm:
                found[own] = rescaled_norm(module, moments, kept)
                continue
            weight, bias = compensate_linear(weight_of(module), module.bias, moments, kept)
            outputs: Any = slice(None)
            into = int(not isinstance(module, Conv1D))
            if 1 - into in spans[f"{name}.weight"]:
                outputs = kept
            elif index:
                row = rows[place[int(index)]]
                dim, layout = layer_axes(layers_of(model)[int(index)], family).get(f"{path}.weight", (into, ""))
                if dim != into:
                    outputs = kept_channels(layout, row, counts[int(index)], dims.head_size)
            found[own] = weight[outputs], None if bias is None else bias[outputs]
    return found


def rescaled_norm(norm: Any, moments: Moments, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias for a norm over the `kept` channels, so that in the mean they come out as of all channels.

    With z what the norm makes before weight and bias, over all channels: of the kept ones alone it makes (z - m) / s, where m
    and s are their mean (0 for a norm without one) and spread in a token. The weight takes the root mean square of s over
    tokens, the bias the mean of m, both from the second moments of what the norm gives out.

    Args:
        norm: over all C channels; RMSNorm, its form with weight + 1 (Gemma), or LayerNorm.
        moments: of what it gives out.
        kept: indices (K,).

    Returns:
        Weight (K,) and bias (K,) or None, in the dtype and on the device of the old.
    """
    weight, bias = norm.weight, getattr(norm, "bias", None)
    gain, shift, plus = _affine(norm)
    usable = kept[gain[kept].abs() > 1e-3 * gain.abs().mean()]  # what a weight near zero has erased tells nothing
    w, b = gain[usable], shift[usable]
    mean, second = moments.mean.double()[usable], moments.second.double()[usable][:, usable]
    if not (len(usable) and torch.isfinite(second).all() and second.diagonal().sum() > 0):
        return weight.detach()[kept.to(weight.device)], None if bias is None else bias.detach()[kept.to(bias.device)]
    cross = torch.outer(b, mean)
    z = (second - cross - cross.T + torch.outer(b, b)) / torch.outer(w, w)
    middle = torch.zeros((), dtype=z.dtype)
    square = z.diagonal().mean()
    if _centres(norm):
        middle = ((mean - b) / w).mean()
        square = square - z.mean()
    new_weight = square.clamp(min=0).sqrt() * gain[kept] - plus
    new_bias = None if bias is None else (shift + gain * middle)[kept].to(bias)
    return new_weight.to(weight), new_bias


def _centres(norm: Any) -> bool:
    """Whether a norm takes the mean away: it gives the same for what lies a constant higher."""
    x = torch.tensor([1.0, -1.0] * len(norm.weight))[: len(norm.weight)].to(norm.weight)
    with torch.no_grad():
        return bool((norm(x + 2) - norm(x)).abs().max() < 1e-2 * norm(x).abs().max().clamp(min=1e-6))


def _affine(norm: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Per channel by what a norm multiplies and what it adds, in fp64; and what it adds to its weight first (Gemma's 1)."""
    weight, bias = norm.weight.detach().cpu().double(), getattr(norm, "bias", None)
    x = torch.tensor([1.0, -1.0] * len(weight))[: len(weight)].to(norm.weight)
    with torch.no_grad():
        measured = ((norm(x) - norm(-x)) / (2 * x)).cpu().double()
    plus = float((measured - weight).median().round())
    shift = torch.zeros_like(weight) if bias is None else bias.detach().cpu().double()
    return weight + plus, shift, plus
