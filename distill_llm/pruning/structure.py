"""Sizes of a model's layers, what a unit costs, and views of a layer's weights by unit."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.errors import InputError, one_of
from distill_llm.pruning.modeling_pruned import Family, family_of, layers_of


class LayerShape(NamedTuple):
    """Numbers of heads and FFN neurons of a layer."""

    heads: int
    neurons: int


def head_size_of(model: PreTrainedModel) -> int:
    """Channels per head. A pruned model's config keeps the original head count, so this holds for it too."""
    return model.config.hidden_size // model.config.num_attention_heads


def linear(layer: nn.Module, path: str) -> nn.Linear:
    """The linear at a path of the family's row."""
    found = layer.get_submodule(path)
    assert isinstance(found, nn.Linear), f"{path} is {type(found).__name__}"
    return found


def layer_shapes(model: PreTrainedModel) -> list[LayerShape]:
    """Heads and neurons of every layer, as they are now."""
    family, head_size = _family(model), head_size_of(model)
    return [
        LayerShape(
            linear(layer, family.attention_out).in_features // head_size, linear(layer, family.ffn_out).in_features
        )
        for layer in layers_of(model)
    ]


def _family(model: PreTrainedModel) -> Family:
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise InputError(
            "model", "a quantized model", "its full-precision original: prune first, then quantize the student"
        )
    return family_of(model)


@dataclass(frozen=True)
class Costs:
    """What one head, one neuron and the rest of a layer (norms, output biases) cost."""

    name: str
    head: float
    neuron: float
    rest: float

    def of(self, shapes: Iterable[tuple[int, int]]) -> float:
        """Cost of layers of (heads, neurons)."""
        return sum(heads * self.head + neurons * self.neuron + self.rest for heads, neurons in shapes)


def unit_costs(model: PreTrainedModel, cost: str = "params", sequence_length: int = 128) -> Costs:
    """Cost of a head, a neuron and the rest of a layer.

    Args:
        cost: "params", or "flops" (2 x multiply-adds, per token of a sequence of `sequence_length` tokens).

    Raises:
        InputError: for another `cost`.
    """
    family, head_size = _family(model), head_size_of(model)
    layers, shapes = layers_of(model), layer_shapes(model)
    hidden = linear(layers[0], family.attention_out).out_features
    if cost == "params":
        # Counted from the weights themselves: biases are not everywhere, and a layer may have lost its attention.
        with_heads = next((layer for layer, shape in zip(layers, shapes, strict=True) if shape.heads), None)
        into = [linear(with_heads, p) for p in (family.query, family.key, family.value)] if with_heads else []
        head = sum(head_size * (hidden + (m.bias is not None)) for m in into) + head_size * hidden
        neuron = sum(hidden + (linear(layers[0], p).bias is not None) for p in family.ffn_in) + hidden
        own = sum(p.numel() for p in layers[0].parameters())
        return Costs("parameters", head, neuron, own - shapes[0].heads * head - shapes[0].neurons * neuron)
    if cost == "flops":
        return Costs(
            "FLOPs", 8 * head_size * hidden + 4 * sequence_length * head_size, 2 * hidden * (len(family.ffn_in) + 1), 0
        )
    raise InputError("cost", cost, one_of(("params", "flops"), cost))


def weight_norms(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per layer, the sum of squared weights of every head and of every neuron (rows that make it and columns that use it)."""
    family, head_size = _family(model), head_size_of(model)
    norms = []
    for layer in layers_of(model):
        shares = []
        for into, out in (
            ((family.query, family.key, family.value), family.attention_out),
            (family.ffn_in, family.ffn_out),
        ):
            channels = linear(layer, out).weight.detach().float().square().sum(0)
            for path in into if channels.numel() else ():
                channels = channels + linear(layer, path).weight.detach().float().square().sum(1)
            shares.append(channels)
        norms.append((shares[0].view(-1, head_size).sum(1), shares[1]))
    return norms
