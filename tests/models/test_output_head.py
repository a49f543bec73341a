"""Heads of real models: the logits they make, and what they are trained by."""

from typing import Any

import pytest
import torch
from builders.heads import HeadSums, chunked, dense, dense_logits
from builders.models import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from distill_llm.common.errors import InputError
from distill_llm.models.output_head import head_of


def causal(config: Any) -> Any:
    """A tiny causal model with its own seed, with large enough weights that the logits differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    return model


SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("cohere", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 3.0}),
        ("hyperclovax", {"logits_scaling": 3.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma3_text", {"final_logit_softcapping": 2.0}),
        (
            "minicpm3",
            {
                "dim_model_base": 8,
                "head_dim": 8,
                "num_key_value_heads": 2,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
            },
        ),
        ("nanochat", {"final_logit_softcapping": 2.0}),
        ("recurrent_gemma", {"logits_soft_cap": 2.0, "lru_width": 32, "num_hidden_layers": 3}),
        ("falcon_h1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}),
        ("mpt", {"d_model": 32, "n_heads": 2, "n_layers": 1, "logit_scale": 0.25}),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 1}),
    ],
    ids=str,
)
def test_head_of_a_model_makes_that_models_logits(family: str, fields: dict[str, Any]) -> None:
    model = causal(AutoConfig.for_model(family, **{**SIZES, **fields}))
    ids = torch.randint(3, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        torch.testing.assert_close(
            dense_logits(head_of(model), hidden), model(ids).logits.float(), rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("family", ["bert", "distilbert", "electra", "roberta"])
def test_a_head_with_layers_before_its_output_map_is_refused_or_taken_after_them(family: str) -> None:
    model = tiny_model(family, "masked-lm")
    with pytest.raises(InputError, match="around its output map"):
        head_of(model)
    inputs = []
    linear = model.get_output_embeddings()
    linear.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7]])).logits
        torch.testing.assert_close(dense_logits(head_of(model, transformed=True), inputs[0]), logits)


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="linear output map"):
        head_of(tiny_model("bert"))


@pytest.mark.parametrize("autocast", [False, True])
def test_tied_embeddings_of_a_real_model_get_both_gradients(autocast: bool) -> None:
    config = AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True)
    model = causal(config)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    teacher = causal(AutoConfig.for_model("llama", **{**SIZES, "hidden_size": 48, "vocab_size": 64}))
    ids = torch.randint(3, 50, (3, 9), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].flatten()
    with torch.no_grad():
        targets = teacher.model(ids).last_hidden_state[:, :-1].flatten(0, 1)

    def student(in_chunks: bool) -> tuple[HeadSums, dict[str, torch.Tensor]]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            hidden = model.model(ids).last_hidden_state[:, :-1].flatten(0, 1)
            function, more = (chunked, {"chunk": 5}) if in_chunks else (dense, {})
            options = {"label_weight": 0.1, "logits_weight": 0.05, "temperature": 2.0, **more}
            found = function(head_of(model), hidden, labels, head_of(teacher), targets, **options)
        found.total.backward()
        return found, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    (found, got), (expected, whole) = student(True), student(False)
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(found.total, expected.total, rtol=tolerance, atol=tolerance)
    for name, gradient in whole.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name
