"""Exported files in a real llama.cpp: the same tokens, the same probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from builders.exports import (
    TEXTS,
    ask_llama_cpp,
    byte_tokenizer,
    llama_kind,
    needs_llama_cpp,
    save,
    sentencepiece_tokenizer,
    uneven,
)
from transformers import PreTrainedModel

from distill_llm.export import export

pytestmark = [needs_llama_cpp, pytest.mark.slow]
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE["original_max_position_embeddings"] = 32
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
ASKED = ("probabilities", "likelihood")
BIASED = {"attention_bias": True, "mlp_bias": True}


def largest_difference(model: PreTrainedModel, file: Path) -> float:
    tokens = torch.randint(2, 340, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    found, likelihood = map(torch.tensor, ask_llama_cpp(file, *({"kind": k, "tokens": tokens} for k in ASKED)))
    seen = found[range(47), tokens[1:]].log()
    torch.testing.assert_close(likelihood, seen, rtol=0, atol=1e-3)  # those that perplexity is made of
    with torch.inference_mode():
        wanted = model(torch.tensor([tokens])).logits[0].float().softmax(-1)
    assert wanted.max() > 0.1  # a model that has opinions
    return (found - wanted).abs().max().item()


@pytest.mark.parametrize("kind", ["f32", "f16"])
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE}),
        ("llama", BIASED | {"rope_parameters": LINEAR_ROPE}),
        ("mistral", {}),
        ("qwen2", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
    ids=["llama", "llama3-rope", "biases", "mistral", "qwen2", "qwen3"],
)
def test_next_token_probabilities_are_those_of_transformers(
    family: str, config: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    model = uneven(llama_kind(family, **config))
    file = export(save(model, tmp_path), "gguf", quantize=kind).path
    assert largest_difference(model, file) < 2e-3


@pytest.mark.parametrize(("family", "hidden"), [("llama", 64), ("qwen2", 128), ("qwen3", 64)])
def test_a_student_of_even_layers_runs_under_its_own_architecture(family: str, hidden: int, tmp_path: Path) -> None:
    model = llama_kind(family, hidden_size=hidden)
    exported = export(save(model, tmp_path), "gguf", quantize="f32")
    assert f"architecture {family}" in exported.summary
    assert largest_difference(model, exported.path) < 2e-3


def test_even_heads_that_do_not_fill_the_width_of_a_qwen2_run_as_well(tmp_path: Path) -> None:
    model = llama_kind("qwen2")
    exported = export(save(model, tmp_path), "gguf", quantize="f32")
    assert "architecture deci" in exported.summary
    assert largest_difference(model, exported.path) < 2e-3


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2", "sentencepiece"])
def test_texts_become_the_same_tokens(rule: str, tmp_path: Path) -> None:
    tokenizer = sentencepiece_tokenizer() if rule == "sentencepiece" else byte_tokenizer(rule)
    file = export(save(llama_kind(), tmp_path, tokenizer), "gguf").path
    found = ask_llama_cpp(file, {"kind": "tokenize", "texts": TEXTS})[0]
    assert found == [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
