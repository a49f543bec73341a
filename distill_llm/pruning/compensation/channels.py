"""Compensation for removed channels of the residual stream.

Removing a channel has two effects. The linears that read it lose a column, which is folded into the kept columns (see
`compensate_linear`). And a norm over fewer channels scales the kept ones by another factor than before; a norm that subtracts
the mean also shifts them by another amount. The norm's weight and bias make up for the average of both.
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
    model: PreTrainedModel, rows: Sequence[LayerPlan], kept: torch.Tensor, statistics: Statistics, ridge: float
) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """New weights and biases for the norms and linears that read the residual stream, which keeps only some channels.

    Args:
        rows: what stays, a row per remaining layer.
        kept: indices (K,) of the channels that stay.
        statistics: of this model; without `hidden_moments` nothing is compensated.
        ridge: see `compensate_linear`.

    Returns:
        Weight and bias by the module's name in the student. A linear's weight is (kept outputs, K), a norm's is (K,).

    Raises:
        InputError: the statistics are of another model.
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
            weight, bias = compensate_linear(weight_of(module), module.bias, moments, kept, ridge)
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
    """Weight and bias for a norm over the `kept` channels only, so that its output matches the old norm's on average.

    Let z be the normalized input of the old norm, before weight and bias. Over the kept channels alone a norm makes
    (z - m) / s of it, where m and s are the mean (0 for RMSNorm) and the scale of z over the kept channels of a token. The
    weight is multiplied by the root mean square of s over tokens, and the weight times the mean of m is added to the bias. Both
    come from the second moments of the norm's output.

    Args:
        norm: over all C channels: RMSNorm, RMSNorm that adds 1 to its weight (Gemma), or LayerNorm.
        moments: of its output.
        kept: indices (K,).

    Returns:
        Weight (K,) and bias (K,) or None, in the old dtype and on the old device.
    """
    weight, bias = norm.weight, getattr(norm, "bias", None)
    gain, shift, plus = _affine(norm)
    # Where the weight is near zero, it has erased z, which cannot be recovered.
    usable = kept[gain[kept].abs() > 1e-3 * gain.abs().mean()]
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
    """Whether a norm subtracts the mean: then a constant added to its input does not change its output."""
    x = torch.tensor([1.0, -1.0] * len(norm.weight))[: len(norm.weight)].to(norm.weight)
    with torch.no_grad():
        return bool((norm(x + 2) - norm(x)).abs().max() < 1e-2 * norm(x).abs().max().clamp(min=1e-6))


def _affine(norm: Any) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A norm's factor and shift for each channel, in fp64, and what it adds to its weight to get the factor (Gemma: 1)."""
    weight, bias = norm.weight.detach().cpu().double(), getattr(norm, "bias", None)
    x = torch.tensor([1.0, -1.0] * len(weight))[: len(weight)].to(norm.weight)
    with torch.no_grad():
        measured = ((norm(x) - norm(-x)) / (2 * x)).cpu().double()
    plus = float((measured - weight).median().round())
    shift = torch.zeros_like(weight) if bias is None else bias.detach().cpu().double()
    return weight + plus, shift, plus
