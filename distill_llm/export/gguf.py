"""GGUF files, for llama.cpp and what is built on it."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, LlamaFileType
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from distill_llm.architectures.families import dims_of, width_of
from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.export.formats import Exported
from distill_llm.export.gguf_layouts import LayerSize, Layout, check_config, layout_of
from distill_llm.export.gguf_tensors import tensors_of
from distill_llm.export.gguf_tokenizer import Vocabulary, vocabulary_of
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.models.configs import open_tokenizer

TYPES = {
    "f32": (Type.F32, LlamaFileType.ALL_F32),
    "f16": (Type.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (Type.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Type.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ROW = 256
"""Inputs of a matrix must be a multiple of this for llama.cpp's K-quants; else it takes larger types."""


def check(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check the family and the tokenizer.

    Raises:
        InputError: llama.cpp has none like it.
    """
    check_config(config)
    vocabulary_of(tokenizer, config.vocab_size)


def write(model_dir: Path, output: Path, quantize: str) -> Exported:
    """Write a model and its tokenizer as one GGUF file.

    Raises:
        InputError: llama.cpp has no architecture or tokenizer for it, or float16 cannot hold a weight.
    """
    model = load_pretrained(model_dir)
    layout, sizes = layout_of(model)
    tokenizer = open_tokenizer(model_dir, model.config)
    vocabulary = vocabulary_of(tokenizer, _rows(model))
    kind, file_type = TYPES[quantize]
    with written_whole(output) as own:
        writer = GGUFWriter(own, layout.name)
        writer.add_file_type(file_type)
        _add_sizes(writer, model, sizes)
        _add_tokenizer(writer, model_dir, tokenizer, vocabulary)
        _write_tensors(writer, model, layout, sizes, kind)
    megabytes = output.stat().st_size / 2**20
    summary = f"{output}: architecture {layout.name}, {quantize}, {megabytes:.1f} MB"
    return Exported(output, summary, tuple(_rows_for_k_quants(model, sizes)))


def _rows(model: PreTrainedModel) -> int:
    """Rows of the embedding."""
    embedding: Any = model.get_input_embeddings()
    return len(embedding.weight)


def _add_sizes(writer: GGUFWriter, model: PreTrainedModel, sizes: list[LayerSize]) -> None:
    config, head_size = model.config, dims_of(model.config).head_size
    rope = config.rope_parameters
    writer.add_name(str(getattr(config, "name_or_path", "") or config.model_type).rstrip("/").rpartition("/")[2])
    writer.add_block_count(len(sizes))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width_of(model))
    writer.add_vocab_size(_rows(model))
    for add, counts in (
        (writer.add_feed_forward_length, [size.neurons for size in sizes]),
        (writer.add_head_count, [size.heads for size in sizes]),
        (writer.add_head_count_kv, [size.groups for size in sizes]),
    ):
        add(counts[0] if len(set(counts)) == 1 else counts)
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _add_tokenizer(
    writer: GGUFWriter, model_dir: Path, tokenizer: PreTrainedTokenizerBase, vocabulary: Vocabulary
) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.rule)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "gpt2":
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    for add, index in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if index is not None:
            add(index)
    if (other := _second_end(model_dir, tokenizer)) is not None:
        writer.add_eot_token_id(other)
    ids: Any = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _second_end(model_dir: Path, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """A token that ends answers beside the tokenizer's own end of text, as the generation config says."""
    if not (model_dir / "generation_config.json").is_file():
        return None
    ends = GenerationConfig.from_pretrained(model_dir).eos_token_id
    others = [end for end in (ends if isinstance(ends, list) else [ends]) if end not in (None, tokenizer.eos_token_id)]
    return others[0] if others else None


def _write_tensors(
    writer: GGUFWriter, model: PreTrainedModel, layout: Layout, sizes: list[LayerSize], kind: Type
) -> None:
    """Twice over the tensors, first their sizes, then their values: one of them is in memory at a time."""
    for name, tensor in tensors_of(model, layout, sizes):
        own = _type_of(tensor, kind)
        shape = gguf.quant_shape_to_byte_shape(tensor.shape, own)
        quantized = own not in (Type.F32, Type.F16)
        size = np.dtype(np.uint8 if quantized else np.float16 if own == Type.F16 else np.float32)
        nbytes = int(np.prod(shape)) if quantized else tensor.numel() * size.itemsize
        writer.add_tensor_info(name, shape if quantized else tensor.shape, size, nbytes, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, tensor in tensors_of(model, layout, sizes):
        writer.write_tensor_data(_values(name, tensor, _type_of(tensor, kind)))
    writer.close()


def _type_of(tensor: torch.Tensor, kind: Type) -> Type:
    """Vectors stay in float32; a matrix whose rows do not divide into blocks is float16."""
    if tensor.dim() < 2:
        return Type.F32
    return Type.F16 if kind == Type.Q8_0 and tensor.shape[-1] % 32 else kind


def _values(name: str, tensor: torch.Tensor, kind: Type) -> np.ndarray:
    values = tensor.float().contiguous().cpu().numpy()
    if kind == Type.F32:
        return values
    if kind == Type.F16:
        if np.abs(values).max(initial=0.0) > np.finfo(np.float16).max:
            raise InputError("quantize", "f16", fix=f"use bf16 or f32: {name} has weights that float16 cannot hold")
        return values.astype(np.float16)
    return gguf.quantize(values, kind)


def _rows_for_k_quants(model: PreTrainedModel, sizes: list[LayerSize]) -> list[str]:
    """What to know before the file is quantized further by llama.cpp."""
    head_size = dims_of(model.config).head_size
    odd = [
        f"layer {index}"
        for index, size in enumerate(sizes)
        if size.neurons % ROW or size.heads * head_size % ROW or width_of(model) % ROW
    ]
    if not odd:
        return []
    shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    return [
        f"K-quants take larger types for matrices whose rows are no multiple of {ROW} ({shown}): prune with "
        f"`pruning.round_to: {ROW}` for the FFN, and keep heads x {head_size} a multiple of {ROW}"
    ]
