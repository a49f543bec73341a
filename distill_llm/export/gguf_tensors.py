"""The tensors of a GGUF file, one by one, from a model's weights."""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import dims_of, layers_of
from distill_llm.export.gguf_layouts import LayerSize, Layout

Named = tuple[str, torch.Tensor]


def tensors_of(model: PreTrainedModel, layout: Layout, sizes: list[LayerSize]) -> Iterator[Named]:
    """(name, tensor) in the order of the file; a tensor is made when it is asked for."""
    base, head_size = model.base_model, dims_of(model.config).head_size
    yield "token_embd.weight", model.get_input_embeddings().weight.detach()
    yield "output_norm.weight", base.norm.weight.detach()
    if not model.config.tie_word_embeddings:
        yield "output.weight", model.get_output_embeddings().weight.detach()
    if (factors := _frequency_factors(model, head_size)) is not None:
        yield "rope_freqs.weight", factors
    for index, (layer, size) in enumerate(zip(layers_of(model), sizes, strict=True)):
        parts = [*_attention(layer, size, layout, head_size), *_ffn(layer, size)]
        yield from ((f"blk.{index}.{name}", tensor) for name, tensor in parts)


def _attention(layer: nn.Module, size: LayerSize, layout: Layout, head_size: int) -> Iterator[Named]:
    if not size.heads:
        return
    attention, norm = layer.get_submodule("self_attn"), layer.get_submodule("input_layernorm").weight.detach()
    yield "attn_norm.weight", norm
    output = attention.get_submodule("o_proj")
    if size.no_heads:  # a group of zeros
        queries = norm.new_zeros(head_size, len(norm))
        parts = {letter: [("weight", queries)] for letter in "qkv"}
        weight = norm.new_zeros(len(norm), head_size)
    else:
        parts = {
            letter: list(_projection(attention.get_submodule(f"{letter}_proj"), count, layout.interleaved and turned))
            for letter, count, turned in (("q", size.heads, True), ("k", size.groups, True), ("v", size.groups, False))
        }
        weight = output.weight.detach()
    if layout.fused:
        yield "attn_qkv.weight", torch.cat([parts[letter][0][1] for letter in "qkv"])
    else:
        yield from ((f"attn_{letter}.{kind}", tensor) for letter in "qkv" for kind, tensor in parts[letter])
    for letter in "qk":
        if hasattr(attention, f"{letter}_norm"):
            yield f"attn_{letter}_norm.weight", attention.get_submodule(f"{letter}_norm").weight.detach()
        elif layout.fused:
            yield f"attn_{letter}_norm.weight", norm.new_ones(head_size)
    yield "attn_output.weight", weight
    if output.bias is not None:
        yield "attn_output.bias", output.bias.detach()


def _projection(linear: nn.Module, heads: int, interleaved: bool) -> Iterator[Named]:
    """Weight and bias of a projection; `interleaved`: the halves of each head's channels, alternating."""
    for kind, tensor in (("weight", linear.weight), ("bias", linear.bias)):
        if tensor is not None:
            tensor = tensor.detach()
            if interleaved:
                tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
            yield kind, tensor


def _ffn(layer: nn.Module, size: LayerSize) -> Iterator[Named]:
    norm = layer.get_submodule("post_attention_layernorm").weight.detach()
    yield "ffn_norm.weight", norm
    for name, path in (("ffn_gate", "mlp.gate_proj"), ("ffn_up", "mlp.up_proj"), ("ffn_down", "mlp.down_proj")):
        linear, down = layer.get_submodule(path), name == "ffn_down"
        shape = (len(norm), size.neurons) if down else (size.neurons, len(norm))
        yield f"{name}.weight", norm.new_zeros(shape) if size.no_neurons else linear.weight.detach()
        if linear.bias is not None:
            yield f"{name}.bias", norm.new_zeros(size.neurons) if size.no_neurons and not down else linear.bias.detach()


def _frequency_factors(model: PreTrainedModel, head_size: int) -> torch.Tensor | None:
    """By what rotary frequencies are divided, one for each pair of channels; None: by nothing, or all by one number."""
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    plain = rope["rope_theta"] ** (-torch.arange(0, head_size, 2, dtype=torch.float32) / head_size)
    return plain / model.base_model.rotary_emb.inv_freq.float().cpu()
