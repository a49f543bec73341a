"""What is captured equals what the model itself reports, under every kernel, and nothing is left behind."""

import json
import re

import pytest
import torch
from builders.models import FAMILIES, random_batch, tiny_model
from builders.trainers import causal_model
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import AutoConfig, AutoModel, masking_utils
from transformers.integrations import flex_attention as integration

from distill_llm.common.errors import InputError
from distill_llm.losses.signals import EMBEDDINGS, Wanted
from distill_llm.models.attention_kernels import _listeners
from distill_llm.models.capture import Recorder
from distill_llm.models.item_logits import packed


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_probabilities_and_hidden_states_equal_those_of_eager_attention(family, kernel):
    model = tiny_model(family, attn_implementation="eager")
    batch = random_batch(model, labels=False)
    with torch.no_grad():
        expected = model(**batch, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation(kernel)
    recorder = Recorder(model, Wanted(hidden=(EMBEDDINGS, 0, 2), attention=(1, 2)))
    with torch.no_grad(), recorder.recording() as recording:
        logits = model(**batch).logits
    torch.testing.assert_close(logits, expected.logits)
    assert recording.hidden.keys() == {EMBEDDINGS, 0, 2} and recording.attention.keys() == {1, 2}
    for index, state in recording.hidden.items():
        torch.testing.assert_close(state, expected.hidden_states[index + 1])
    for index, inputs in recording.attention.items():
        torch.testing.assert_close(inputs.scores().softmax(-1), expected.attentions[index])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "modernbert"])
def test_causal_grouped_and_sliding_attention_is_seen_too(family):
    own = {"gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4}, "modernbert": {"local_attention": 4}}.get(family, {})
    config = AutoConfig.for_model(
        family,
        **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        **{"intermediate_size": 64, "vocab_size": 100, "attn_implementation": "eager"},
        **own,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    batch = {"input_ids": torch.randint(3, 100, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    for padding in (0, 3):
        batch["attention_mask"][1, 9 - padding :] = 0
        model.set_attn_implementation("eager")
        expected = model(**batch, output_attentions=True).attentions
        for kernel in ("eager", "sdpa"):
            model.set_attn_implementation(kernel)
            with Recorder(model, Wanted(attention=(0, 1))).recording() as recording:
                model(**batch)
            for index, probabilities in enumerate(expected):
                found = recording.attention[index].scores().softmax(-1)
                torch.testing.assert_close(found[0], probabilities[0])
                torch.testing.assert_close(found[1, :, : 9 - padding], probabilities[1, :, : 9 - padding])


@pytest.mark.parametrize("window", [None, 4])
def test_the_mask_of_flex_attention_is_a_rule_that_is_followed(monkeypatch, window):
    def uncompiled(query, key, value, score_mod=None, block_mask=None, **settings):
        """The kernel in the place of its compiled form, which takes long to make; so does that of the mask."""
        chosen = ("scale", "enable_gqa", "return_aux")
        return flex_attention(query, key, value, score_mod, block_mask, **{name: settings.get(name) for name in chosen})

    def mask(*args, **settings):
        return create_block_mask(*args, **{**settings, "_compile": False})

    monkeypatch.setattr(integration, "compile_friendly_flex_attention", uncompiled)
    monkeypatch.setattr(masking_utils, "create_block_mask", mask)
    model = causal_model("mistral", sliding_window=window)
    batch, seen = random_batch(model, labels=False), []
    for kernel in ("eager", "flex_attention"):
        model.set_attn_implementation(kernel)
        with torch.no_grad(), Recorder(model, Wanted(attention=(0, 2))).recording() as recording:
            logits = model(**batch).logits
        seen.append([logits, *(recording.attention[index].scores().softmax(-1) for index in (0, 2))])
    valid = batch["attention_mask"].bool()
    torch.testing.assert_close(seen[1][0][valid], seen[0][0][valid])
    for found, expected in zip(seen[1][1:], seen[0][1:], strict=True):
        torch.testing.assert_close(found.transpose(1, 2)[valid], expected.transpose(1, 2)[valid])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_queries_keys_and_values_of_grouped_attention_are_what_the_kernel_gets_and_carry_gradients(checkpointing):
    model = causal_model("gemma2")
    if checkpointing:
        model.activation_checkpointing_enable()
        model.train()
    own = {}
    for name in ("k_proj", "v_proj"):
        model.model.layers[1].self_attn.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: own.setdefault(name, output)
        )
    batch = random_batch(model, labels=False)
    with Recorder(model, Wanted(vectors=(1,))).recording() as recording:
        model(**batch)
    query, key, value = recording.vectors[1]
    assert query.shape == (4, 4, 10, 8) and key.shape == value.shape == (4, 2, 10, 8)
    torch.testing.assert_close(value.transpose(1, 2).flatten(2), own["v_proj"])
    torch.testing.assert_close(key[:, :, 0].flatten(1), own["k_proj"][:, 0])  # nothing is rotated at position 0
    (query.sum() + key.sum() + value.sum()).backward()
    for name in ("q_proj", "k_proj", "v_proj"):
        assert model.model.layers[1].self_attn.get_submodule(name).weight.grad.abs().sum() > 0


def test_a_softcap_is_refused_for_attention_probabilities_only():
    model = causal_model("gemma2", attn_implementation="eager")
    batch = random_batch(model, labels=False)
    with Recorder(model, Wanted(vectors=(0,))).recording():
        model(**batch)
    with pytest.raises(InputError, match="^attention: .*softcap"), Recorder(model, Wanted((), (0,))).recording():
        model(**batch)


def test_the_model_runs_on_its_own_kernel_and_configuration_before_and_after(tmp_path):
    model = tiny_model()
    before = model.config._attn_implementation
    recorder = Recorder(model, Wanted(attention=(0,)))
    seen = []
    model.base_model.encoder.layer[0].register_forward_hook(
        lambda *args: seen.append(model.config._attn_implementation)
    )
    with recorder.recording():
        model(**random_batch(model, labels=False))
    assert seen == [f"distill_{before}"]
    assert model.config._attn_implementation == before and len(_listeners) == 0
    model.save_pretrained(tmp_path)
    assert "distill" not in json.dumps(json.loads((tmp_path / "config.json").read_text()))


def test_the_kernel_is_restored_when_the_forward_fails():
    model = tiny_model()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="stop"), Recorder(model, Wanted((0,), (0,))).recording():
        raise RuntimeError("stop")
    assert model.config._attn_implementation == before and len(_listeners) == 0
    assert not model.base_model.encoder.layer[0]._forward_hooks


def test_attention_in_training_mode_is_without_dropout():
    model = tiny_model(attention_probs_dropout_prob=0.5).train()
    with Recorder(model, Wanted(attention=(0,))).recording() as recording:
        model(**random_batch(model, labels=False))
    total = recording.attention[0].scores().softmax(-1).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_two_models_of_one_class_are_told_apart():
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    batch = random_batch(first, labels=False)
    with (
        Recorder(first, Wanted(attention=(0,))).recording() as one,
        Recorder(second, Wanted(attention=(0,))).recording() as two,
    ):
        first(**batch)
        second(**batch)
    assert not torch.equal(one.attention[0].query, two.attention[0].query)


@pytest.mark.parametrize(
    "field, wanted",
    [
        ("losses.attention", Wanted(attention=(0,), fields={"attention": "losses.attention"})),
        ("losses.relations", Wanted(vectors=(0,), fields={"vectors": "losses.relations"})),
    ],
)
def test_a_family_whose_attention_cannot_be_seen_is_refused_in_one_line(field, wanted):
    config = AutoConfig.for_model(
        "mpnet", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    model = AutoModel.from_config(config).eval()
    with (
        pytest.raises(InputError, match=rf"^{re.escape(field)}: .*MPNetModel") as error,
        Recorder(model, wanted).recording(),
    ):
        model(input_ids=torch.randint(3, 100, (2, 5)))
    assert "\n" not in str(error.value)


CAUSAL = ["bloom", "cohere", "gemma2", "gpt2", "gpt_neox", "granite", "llama", "mamba", "opt", "phi3", "qwen3"]

MASKED = {
    **{family: (family, {}) for family in FAMILIES},
    "modernbert": ("modernbert", {"cls_token_id": 1, "sep_token_id": 2}),
    "deberta-v2": ("deberta-v2", {}),
    "deberta-v2, its own head": ("deberta-v2", {"legacy": False}),
}


@pytest.mark.parametrize("family", [*MASKED, *CAUSAL])
def test_a_packed_language_model_head_gives_the_logits_of_the_chosen_tokens_scaled_and_capped_as_ever(family):
    if family in CAUSAL:
        scales = {"final_logit_softcapping": 0.5, "logit_scale": 0.1, "logits_scaling": 7.0}
        model = causal_model(family, **{k: v for k, v in scales.items() if hasattr(AutoConfig.for_model(family), k)})
    else:
        name, own = MASKED[family]
        model = tiny_model(name, head="masked-lm", **own)
    batch = random_batch(model, labels=False)
    positions = batch["attention_mask"].flatten().nonzero().squeeze(-1)
    with torch.no_grad():
        whole = model(**batch).logits
        with packed(model, positions):
            chosen = model(**batch).logits
        assert chosen.shape == (len(positions), 100) and len(positions) < batch["input_ids"].numel()
        assert model(**batch).logits.shape == whole.shape
    torch.testing.assert_close(chosen, whole.flatten(0, 1)[positions])
