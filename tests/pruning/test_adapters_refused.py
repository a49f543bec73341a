"""Models with adapters are not pruned or measured: every public call says in one line to merge first."""

import pytest
import torch
from builders.families import family_batch, family_model, uneven_plan
from peft import AutoPeftModelForCausalLM, LoraConfig, PromptTuningConfig, get_peft_model

import distill_llm
from distill_llm import InputError
from distill_llm.models.finding import open_model

PLAIN = family_model("llama")
BATCH = family_batch(PLAIN) | {"labels": family_batch(PLAIN)["input_ids"]}
PLAN = uneven_plan(PLAIN)


def adapted(kind: str):
    """A tiny model with adapters: a PeftModel, or the transformers model inside it."""
    model = family_model("llama")
    if kind == "added":  # by transformers, without a PeftModel
        model.add_adapter(LoraConfig(target_modules=["lm_head"]))
        return model
    if kind == "prompt":
        return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    where, _, inside = kind.partition(" ")
    saved = {"modules_to_save": ["embed_tokens"]} if where == "saved" else {}
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj" if saved else where], **saved))
    return wrapped.get_base_model() if inside else wrapped


ADAPTED = ("q_proj", "q_proj inside", "lm_head", "lm_head inside", "embed_tokens inside", "saved", "saved inside")
CALLS = {
    "collect_statistics": lambda model: distill_llm.collect_statistics(model, [BATCH]),
    "leave_one_out": lambda model: distill_llm.leave_one_out(model, [BATCH], statistics()),
    "plan_pruning": lambda model: distill_llm.plan_pruning(model, distill_llm.score(statistics(), "taylor"), keep=0.5),
    "plan_for_latency": lambda model: distill_llm.plan_for_latency(
        model, distill_llm.score(statistics(), "taylor"), keep=0.5
    ),
    "masked": lambda model: distill_llm.masked(model, PLAN).__enter__(),
    "prune": lambda model: distill_llm.prune(model, PLAN),
    "keep_layers": lambda model: distill_llm.keep_layers(model, [0, 1]),
    "fit_bypasses": lambda model: distill_llm.fit_bypasses(model, PLAN, [BATCH]),
    "latency_costs": lambda model: distill_llm.latency_costs(model),
    "profile": lambda model: distill_llm.profile(model, 1, 4),
    "compare": lambda model: distill_llm.compare(PLAIN, model, 1, 4),
}


def statistics():
    return distill_llm.collect_statistics(PLAIN, [BATCH])


@pytest.mark.grid(1)
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", [*ADAPTED, "added", "prompt"])
def test_a_model_with_adapters_is_refused_with_what_to_do(kind, call):
    model = adapted(kind)
    with pytest.raises(InputError, match="^model: got .*(with an adapter at|PeftModel)") as caught:
        CALLS[call](model)
    line, merges = str(caught.value), "inside" not in kind and kind not in ("added", "prompt")
    assert "\n" not in line and ("model = model.merge_and_unload()" in line) == merges
    assert "merge" in line


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_of_adapters_is_not_opened_as_the_model_that_it_names(tmp_path, whole):
    """Also beside a whole model: transformers would put them on it."""
    PLAIN.save_pretrained(tmp_path / "plain")
    wrapped = get_peft_model(distill_llm.load_pretrained(tmp_path / "plain"), LoraConfig(target_modules=["q_proj"]))
    if whole:
        PLAIN.save_pretrained(tmp_path / "adapters")
    wrapped.save_pretrained(tmp_path / "adapters")
    for opens in (
        distill_llm.load_pretrained,
        lambda folder: open_model("teacher.model", str(folder)),
    ):
        with pytest.raises(InputError, match="model: got .*adapters'; it holds adapters: merge them first, ") as caught:
            opens(tmp_path / "adapters")
        assert str(caught.value).endswith(", and give the other folder")
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters").merge_and_unload().save_pretrained(
        tmp_path / "other"
    )
    assert type(distill_llm.load_pretrained(tmp_path / "other")) is type(PLAIN)


def test_a_merged_model_is_pruned_and_says_what_the_adapted_one_said():
    wrapped = adapted("q_proj")
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected = wrapped(**BATCH).logits
        plain = wrapped.merge_and_unload()
        found = plain(**BATCH).logits
    assert torch.allclose(found, expected, atol=1e-4)
    assert not (found - PLAIN(**BATCH).logits).abs().max() < 1e-3
    assert distill_llm.prune(plain, PLAN).num_parameters() < plain.num_parameters()
