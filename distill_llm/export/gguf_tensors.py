"""The tensors of a GGUF file, one by one, from a model's weights."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import dims_of, layers_of
from distill_llm.export.gguf_layouts import LayerSize, Layout

Named = tuple[str, torch.Tensor]


def tensors_of(model: PreTrainedModel, layout: Layout, sizes: list[LayerSize]) -> Iterator[Named]:
    """(name, tensor) in the order of the file; a tensor is made when it is asked for."""
    base: Any = model.base_model
    head_size = dims_of(model.config).head_size
    yield "token_embd.weight", _weight(model.get_input_embeddings())
    yield "output_norm.weight", _weight(base.norm)
    if not model.config.tie_word_embeddings:
        yield "output.weight", _weight(model.get_output_embeddings())
    if (factors := _frequency_factors(model, head_size)) is not None:
        yield "rope_freqs.weight", factors
    for index, (layer, size) in enumerate(zip(layers_of(model), sizes, strict=True)):
        parts = [*_attention(layer, size, layout, head_size), *_ffn(layer, size)]
        yield from ((f"blk.{index}.{name}", tensor) for name, tensor in parts)


def _attention(layer: nn.Module, size: LayerSize, layout: Layout, head_size: int) -> Iterator[Named]:
    if not size.heads:
        return
    attention, norm = layer.get_submodule("self_attn"), _weight(layer.get_submodule("input_layernorm"))
    yield "attn_norm.weight", norm
    output: Any = attention.get_submodule("o_proj")
    if size.no_heads:  # a group of zeros
        queries = norm.new_zeros(head_size, len(norm))
        parts = {letter: [("weight", queries)] for letter in "qkv"}
        weight = norm.new_zeros(len(norm), head_size)
    else:
        parts = {
            letter: list(_projection(attention.get_submodule(f"{letter}_proj"), count, layout.interleaved and turned))
            for letter, count, turned in (("q", size.heads, True), ("k", size.groups, True), ("v", size.groups, False))
        }
        weight = _weight(output)
    if layout.fused:
        yield "attn_qkv.weight", torch.cat([parts[letter][0][1] for letter in "qkv"])
    else:
        yield from ((f"attn_{letter}.{kind}", tensor) for letter in "qkv" for kind, tensor in parts[letter])
    for letter in "qk":
        if hasattr(attention, f"{letter}_norm"):
            yield f"attn_{letter}_norm.weight", _weight(attention.get_submodule(f"{letter}_norm"))
        elif layout.fused:
            yield f"attn_{letter}_norm.weight", norm.new_ones(head_size)
    yield "attn_output.weight", weight
    if output.bias is not None:
        yield "attn_output.bias", output.bias.detach()


def _projection(linear: Any, heads: int, interleaved: bool) -> Iterator[Named]:
    """Weight and bias of a projection; `interleaved`: the halves of each head's channels, alternating."""
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None:
            tensor = tensor.detach()
            if interleaved:
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            yield kind, tensor


def _ffn(layer: nn.Module, size: LayerSize) -> Iterator[Named]:
    norm = _weight(layer.get_submodule("post_attention_layernorm"))
    yield "ffn_norm.weight", norm
    for name, path in (("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
        linear: Any = layer.get_submodule(path)
        down = name == "ffn_down"
        shape = (len(norm), size.neurons) if down else (size.neurons, len(norm))
        yield f"{name}.weight", norm.new_zeros(shape) if size.no_neurons else _weight(linear)
        if linear.bias is not None:
            yield f"{name}.bias", norm.new_zeros(size.neurons) if size.no_neurons and not down else linear.bias.detach()


def _frequency_factors(model: PreTrainedModel, head_size: int) -> torch.Tensor | None:
    """By what rotary frequencies are divided, one for each pair of channels; None: by nothing, or all by one number."""
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    plain = rope["rope_theta"] ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    base: Any = model.base_model
    return plain / base.rotary_emb.inv_freq.float().cpu()


def _weight(module: Any) -> torch.Tensor:
    return module.weight.detach()
