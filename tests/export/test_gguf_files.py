"""GGUF files, read back by gguf's own reader and by transformers."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from builders.exports import HEAD, byte_tokenizer, llama_kind, save, sentencepiece_tokenizer, uneven
from builders.models import tiny_model
from transformers import AutoModelForCausalLM

from distill_llm import prune
from distill_llm.architectures.lineage import LayerPlan
from distill_llm.common.errors import InputError
from distill_llm.export import export
from distill_llm.export.gguf_tokenizer import ADDED, BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, vocabulary_of
from distill_llm.models.gguf import plain_checkpoint
from distill_llm.pruning.plan import PruningPlan


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Metadata and tensors (float32) of a file."""
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {each.name: gguf.dequantize(each.data, each.tensor_type) for each in reader.tensors}


@pytest.mark.parametrize(("family", "hidden"), [("llama", 64), ("qwen2", 128)])
def test_transformers_reads_a_student_of_even_layers_back(family: str, hidden: int, tmp_path: Path) -> None:
    model = llama_kind(family, hidden_size=hidden)
    rows = [LayerPlan(index, (1,), range(32)) for index in (0, 1, 3)]
    student = prune(model, PruningPlan(family, rows)) if family != "qwen2" else model
    file = export(save(student, tmp_path), "gguf", quantize="f32").path
    back = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    ids = torch.randint(2, 340, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(back(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-5)


def test_an_uneven_student_has_sizes_by_layer(tmp_path: Path) -> None:
    student = uneven(llama_kind())
    file = export(save(student, tmp_path), "gguf", quantize="f32").path
    fields, tensors = read(file)
    assert fields["general.architecture"] == "deci"
    assert fields["deci.attention.head_count"] == [2, 0, 4, 2]
    assert fields["deci.attention.head_count_kv"] == [1, 0, 2, 1]
    assert fields["deci.feed_forward_length"] == [48, 32, 32, 56]  # of no neurons, 32 that are zero
    assert fields["deci.attention.key_length"] == fields["deci.rope.dimension_count"] == HEAD
    assert not any(name.startswith("blk.1.attn") for name in tensors)
    assert not tensors["blk.2.ffn_up.weight"].any() and tensors["blk.2.ffn_up.weight"].shape == (32, 64)
    with pytest.raises(InputError, match=r"^model: got .*\(deci files run in llama.cpp only: give the folder that it"):
        plain_checkpoint(file)


def test_a_qwen3_whose_heads_are_not_of_the_usual_size_is_not_read_back(tmp_path: Path) -> None:
    """transformers' reader takes 128 for the size of a head of every Qwen3."""
    file = export(save(llama_kind("qwen3"), tmp_path), "gguf", quantize="f32").path
    with pytest.raises(InputError, match="is read at another size by transformers"):
        plain_checkpoint(file)


def test_channels_of_queries_and_keys_alternate_between_the_halves_of_a_head(tmp_path: Path) -> None:
    student = uneven(llama_kind(attention_bias=True))
    _, tensors = read(export(save(student, tmp_path), "gguf", quantize="f32").path)
    attention = student.model.layers[2].self_attn
    order = [head * HEAD + half * HEAD // 2 + i for head in range(4) for i in range(HEAD // 2) for half in (0, 1)]
    np.testing.assert_array_equal(tensors["blk.2.attn_q.weight"], attention.q_proj.weight.detach()[order])
    np.testing.assert_array_equal(tensors["blk.2.attn_q.bias"], attention.q_proj.bias.detach()[order])
    np.testing.assert_array_equal(tensors["blk.2.attn_k.bias"], attention.k_proj.bias.detach()[order[: 2 * HEAD]])
    np.testing.assert_array_equal(tensors["blk.2.attn_v.weight"], attention.v_proj.weight.detach())


def test_an_attention_that_left_a_bias_is_a_group_of_zeros(tmp_path: Path) -> None:
    student = uneven(llama_kind(attention_bias=True))
    fields, tensors = read(export(save(student, tmp_path), "gguf", quantize="f32").path)
    assert fields["deci.attention.head_count"] == [2, 1, 4, 2]
    assert not tensors["blk.1.attn_output.weight"].any()
    np.testing.assert_array_equal(
        tensors["blk.1.attn_output.bias"], student.model.layers[1].self_attn.o_proj.bias.detach()
    )


def test_an_uneven_qwen3_has_fused_projections(tmp_path: Path) -> None:
    student = uneven(llama_kind("qwen3", tie_word_embeddings=True))
    fields, tensors = read(export(save(student, tmp_path), "gguf", quantize="f32").path)
    assert fields["openelm.attention.head_count"] == [2, 1, 4, 2]
    attention = student.model.layers[0].self_attn
    rows = [attention.get_submodule(f"{name}_proj").weight.detach() for name in "qkv"]
    np.testing.assert_array_equal(tensors["blk.0.attn_qkv.weight"], torch.cat(rows))
    assert "output.weight" not in tensors


@pytest.mark.parametrize(("kind", "bound"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 1 / 127)])
def test_types_round_as_far_as_they_must(kind: str, bound: float, tmp_path: Path) -> None:
    model = llama_kind()
    fields, tensors = read(export(save(model, tmp_path), "gguf", quantize=kind).path)
    exact = model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    error = np.abs(tensors["blk.0.ffn_down.weight"] - exact)
    # Eight bits share a scale in blocks of 32; of the others each number has its own.
    scale = np.abs(exact).reshape(64, -1, 32).max(-1).repeat(32, -1) if kind == "q8_0" else np.abs(exact)
    assert (error <= bound * scale + 1e-7).all() and error.any()
    np.testing.assert_array_equal(tensors["output_norm.weight"], model.model.norm.weight.detach())
    assert fields["general.file_type"] == {"f16": 1, "bf16": 32, "q8_0": 7}[kind]


def test_a_row_that_does_not_divide_into_blocks_is_half_precision(tmp_path: Path) -> None:
    model = prune(llama_kind(), PruningPlan("llama", [LayerPlan(index, (0,), range(40)) for index in range(4)]))
    file = export(save(model, tmp_path), "gguf", quantize="q8_0").path
    types = {each.name: each.tensor_type.name for each in gguf.GGUFReader(file).tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"


def test_what_k_quants_need_is_said(tmp_path: Path) -> None:
    exported = export(save(uneven(llama_kind()), tmp_path), "gguf")
    assert (
        "`pruning.round_to: 256`" in exported.notes[0] and "layer 0, layer 1, layer 2 and 1 more" in exported.notes[0]
    )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("bert"), "BertForSequenceClassification.*a causal LM of llama, mistral"),
        (lambda: llama_kind("mistral", sliding_window=16), "sliding_window 16"),
        (lambda: llama_kind("llama", hidden_act="gelu"), "hidden_act"),
        (lambda: uneven(llama_kind("qwen3")), "uneven Qwen3 with an output head of its own.*uniform"),
        (
            lambda: llama_kind(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
            "rope_type 'dynamic'",
        ),
    ],
    ids=["bert", "window", "activation", "untied", "rope"],
)
def test_what_llama_cpp_cannot_hold_is_one_line(model: Any, message: str, tmp_path: Path) -> None:
    save(model(), tmp_path)
    with pytest.raises(InputError, match=message):
        export(tmp_path, "gguf")
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}-*"))


def test_weights_beyond_half_precision_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = llama_kind()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    save(model, tmp_path)
    with pytest.raises(InputError, match=r"f16.*use bf16 or f32: blk\.1\.ffn_up\.weight"):
        export(tmp_path, "gguf", quantize="f16")
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}-*"))


def test_tokens_have_types() -> None:
    vocabulary = vocabulary_of(byte_tokenizer(), 345)
    assert vocabulary.types[:3] == [CONTROL, CONTROL, NORMAL] and vocabulary.types[-5:] == [UNUSED] * 5
    tokenizer = sentencepiece_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    vocabulary = vocabulary_of(tokenizer, len(tokenizer))
    assert vocabulary.types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and vocabulary.types[-1] == ADDED
    scores = dict(zip(vocabulary.tokens, vocabulary.scores, strict=True))
    assert scores["▁t"] > scores["he"] > scores["▁the"] > scores["t"]  # the order of the merges
    assert vocabulary.space_prefix


def test_a_tokenizer_larger_than_the_embedding_is_refused() -> None:
    with pytest.raises(InputError, match="at most 100, the rows of the model's embedding"):
        vocabulary_of(byte_tokenizer(), 100)


def test_an_unknown_rule_of_words_is_refused() -> None:
    from tokenizers import pre_tokenizers

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match=r"pre-tokenizer \['Whitespace'\].*gpt-2, smollm, llama-bpe"):
        vocabulary_of(tokenizer, 400)
