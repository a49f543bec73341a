"""The gate of every family: masked, pruned, reloaded and generating students give the same outputs.

To add a family: its row in `families.py`, its tiny config in `tests/builders/families.py` (see docs/development/add-a-family.md).
"""

import copy
import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from builders.causal import word_tokenizer
from builders.families import (
    DECODERS,
    ENCODERS,
    EVERY,
    HEADS,
    HIDDEN,
    IMAGES,
    LAYERS,
    QUERIES,
    VARIANTS,
    assert_equal,
    family_batch,
    family_model,
    groups_of,
    neurons_of,
    outputs_of,
    uneven_plan,
)
from builders.grids import layouts_first, slow
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distill_llm.architectures.families import FAMILIES, dims_of, family_of
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.masking import masked
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.units.sizes import counts_of

DECODING = [*DECODERS, *(name for name, (family, _) in VARIANTS.items() if family in DECODERS)]
LAYOUTS = ["bert", "modernbert", "llama", "olmo2", "stablelm", "phi3", "gpt2", "gpt_neox", "bloom"]


def test_every_family_with_a_row_passes_through_the_gate():
    assert set(FAMILIES) == set(ENCODERS) | set(DECODERS) | set(IMAGES)


@pytest.mark.parametrize(("hidden", "attention"), [(False, None), (True, "eager")], ids=["units", "all-units-eager"])
@pytest.mark.parametrize("name", [*EVERY, *IMAGES])
def test_masked_equals_pruned(name, hidden, attention):
    model = family_model(name, **({"attn_implementation": attention} if attention else {}))
    batch, plan = family_batch(model), uneven_plan(model, hidden, queries=True)
    whole, state = outputs_of(model, batch), {k: v.clone() for k, v in model.state_dict().items()}
    student = prune(model, plan)
    with masked(model, plan):
        expected = outputs_of(model, batch)
    assert_equal(outputs_of(student, batch), expected)
    assert (whole - expected).abs().max() > 0.01, "the plan changes the outputs"
    assert torch.equal(outputs_of(model, batch), whole), "nothing of the mask stays behind"
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    loss_of(student.train(), batch).backward()
    assert [n for n, p in student.named_parameters() if p.numel() and p.grad is None] == [], "gradients reach all"


def loss_of(model, batch):
    """A number that depends on every output."""
    output = model(**batch)
    parts = [output.start_logits, output.end_logits] if "start_logits" in output else [output[0]]
    return sum(part.float().square().sum() for part in parts)


ALONE = {
    "attention": lambda i, groups, neurons: LayerPlan(i, tuple(range(1, groups)) if i else (), neurons),
    "ffn": lambda i, groups, neurons: LayerPlan(i, tuple(range(groups)), neurons[i::3] if i else ()),
    "first layer": lambda i, groups, neurons: LayerPlan(i, tuple(range(groups)), neurons) if i else None,
    "hidden": lambda i, groups, neurons: LayerPlan(i, tuple(range(groups)), neurons),
    "first layer, hidden": lambda i, groups, neurons: LayerPlan(i, tuple(range(groups)), neurons) if i else None,
}


@pytest.mark.parametrize("units", ALONE)
@pytest.mark.parametrize("name", [*LAYOUTS, "falcon-multi-query", *slow(*IMAGES)])
def test_masked_equals_pruned_where_one_kind_of_unit_goes(name, units):
    model = family_model(name)
    rows = [ALONE[units](i, groups_of(model), tuple(range(neurons_of(model)))) for i in range(LAYERS)]
    channels = tuple(range(3, HIDDEN - 2)) if "hidden" in units else None
    plan = PruningPlan(model.config.model_type, tuple(row for row in rows if row is not None), hidden=channels)
    batch = family_batch(model)
    with masked(model, plan):
        expected = outputs_of(model, batch)
    assert_equal(outputs_of(prune(model, plan), batch), expected)


def test_the_text_model_of_a_multimodal_one_is_had_as_the_docs_say(tmp_path):
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    text |= {"intermediate_size": 64, "vocab_size": 100, "pad_token_id": 0}
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = AutoConfig.for_model(
        "gemma3", text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    torch.manual_seed(0)
    whole = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(
        ValueError, match=r"'gemma3'; accepted: gemma3_text, its text model, .*docs/reference/families.md"
    ):
        family_of(whole)
    whole.save_pretrained(tmp_path / "whole")
    word_tokenizer().save_pretrained(tmp_path / "whole")
    page = (Path(__file__).parents[2] / "docs" / "reference" / "families.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, re.S)[1]
    code = code.replace("google/gemma-3-4b-it", f"{tmp_path}/whole").replace("gemma-3-4b-text", f"{tmp_path}/text")
    exec(code, {"torch": torch, **{name: getattr(transformers, name) for name in re.findall(r"Auto\w+", code)}})
    model = load_pretrained(tmp_path / "text")
    assert family_of(model) == FAMILIES["gemma3_text"]
    batch = family_batch(model)
    assert_equal(outputs_of(model, batch), outputs_of(whole, {**batch, "token_type_ids": 0 * batch["input_ids"]}))


# By hand: in a copy of the model, the columns that read removed heads and neurons are zero, and removed layers are out.

BY_HAND = {
    "bert": ("encoder.layer", "attention.output.dense", "output.dense"),
    "distilbert": ("transformer.layer", "attention.out_lin", "ffn.lin2"),
    "modernbert": ("layers", "attn.Wo", "mlp.Wo"),
    "deberta-v2": ("encoder.layer", "attention.output.dense", "output.dense"),
    "vit": ("layers", "attention.o_proj", "mlp.fc2"),
    "llama": ("layers", "self_attn.o_proj", "mlp.down_proj"),
    "phi3": ("layers", "self_attn.o_proj", "mlp.down_proj"),
    "opt": ("decoder.layers", "self_attn.out_proj", "fc2"),
    "gpt2": ("h", "attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("layers", "attention.dense", "mlp.dense_4h_to_h"),
    "falcon-grouped": ("h", "self_attention.dense", "mlp.dense_4h_to_h"),
}


def zeroed(model: nn.Module, plan: PruningPlan, names: tuple[str, str, str]) -> nn.Module:
    model = copy.deepcopy(model)
    layers, (path, attention, ffn) = model.base_model.get_submodule(names[0]), names
    shared, size = QUERIES // groups_of(model), HIDDEN // QUERIES
    for row in plan.layers:
        kept = row.queries or [head * shared + i for head in row.heads for i in range(shared)]
        columns = {
            attention: [i for i in range(HIDDEN) if i // size not in kept],
            ffn: [i for i in range(neurons_of(model)) if i not in row.neurons],
        }
        for name, gone in columns.items():
            weight = layers[row.source].get_submodule(name).weight.detach()
            (weight if "c_proj" in name else weight.T)[gone] = 0
    parent, _, last = path.rpartition(".")
    kept_layers = nn.ModuleList(layers[row.source] for row in plan.layers)
    setattr(model.base_model.get_submodule(parent), last, kept_layers)
    return model


@pytest.mark.parametrize("name", BY_HAND)
def test_pruned_equals_zeroed_by_hand(name):
    model = family_model(name)
    batch, plan = family_batch(model), uneven_plan(model, queries=True)
    if name == "modernbert":  # its layers differ: leave all in place
        plan = replace(plan, layers=(*plan.layers[:2], LayerPlan(2, (0,), (1,)), *plan.layers[2:]))
    assert_equal(outputs_of(prune(model, plan), batch), outputs_of(zeroed(model, plan, BY_HAND[name]), batch))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3", "phi3"])
def test_narrower_residual_streams_equal_zeroed_by_hand(name):
    """Channels without a writer stay zero, and a mean of squares over fewer channels is that over all, times a factor."""
    model, kept = family_model(name), [c for c in range(HIDDEN) if c % 5]
    gone, share = [c for c in range(HIDDEN) if c % 5 == 0], len(kept) / HIDDEN
    everything = tuple(LayerPlan(i, tuple(range(4)), tuple(range(64))) for i in range(LAYERS))
    student = prune(model, PruningPlan(name, everything, hidden=tuple(kept)))
    batch = family_batch(model)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, gone] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[gone] = 0
            layer.mlp.down_proj.weight[gone] = 0
        for norm in (m for m in model.modules() if type(m).__name__.endswith("RMSNorm") and len(m.weight) == HIDDEN):
            norm.weight *= share**0.5
            norm.variance_epsilon *= share
    assert_equal(outputs_of(student, batch), outputs_of(model, batch))


# Heads.


def heads_of(family: str) -> list[str]:
    """The heads that a family has in transformers."""
    config = type(family_model(family).config)
    return [head for head, auto in HEADS.items() if config in auto._model_mapping]


@pytest.mark.parametrize(
    ("family", "head", "own"),
    [
        *layouts_first([(family, head, {}) for family in FAMILIES for head in heads_of(family)]),
        ("deberta-v2", "masked-lm", {"legacy": False}),
    ],
)
def test_every_head_of_a_narrower_student_is_the_masked_one(family, head, own):
    model = family_model(family, head, num_labels=2, **own)
    batch, plan = family_batch(model), uneven_plan(model, hidden=True)
    with masked(model, plan):
        expected = outputs_of(model, batch)
    if head == "base":
        expected = expected.unflatten(0, (-1, HIDDEN))[:, plan.hidden].flatten()
    student = prune(model, plan)
    assert_equal(outputs_of(student, batch), expected)
    assert type(student).__name__ == f"Pruned{type(model).__name__}" and isinstance(student, type(model))


# Generation: what comes of a cache, token by token, is what the whole forward gives.


def whole_forward(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if "position_ids" in inspect.signature(type(model).forward).parameters:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", DECODING)
def test_generation_with_dynamic_and_static_caches_equals_whole_forwards(name):
    model = family_model(name)
    plan = uneven_plan(model, hidden=True, queries=True)
    first, second, *others = plan.layers
    rows = (replace(first, heads=(), queries=None), replace(second, heads=(0,)), *others)
    student = prune(model, replace(plan, layers=rows))  # its first layer has no attention
    batch, length, tokens = family_batch(student, left=True), 12, 6
    settings = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    mask = torch.cat([batch["attention_mask"], torch.ones(3, tokens, dtype=torch.long)], -1)
    static = [] if name == "falcon-alibi" else [{"cache_implementation": "static"}]  # the original fails there too
    for cache in ({}, *static):
        found = student.generate(**batch, **settings, **cache)
        expected = whole_forward(student, found.sequences, mask)[:, length - 1 : -1]
        assert torch.equal(found.sequences[:, length:], expected.argmax(-1)), cache
        assert_equal(torch.stack(found.logits, 1).flatten(), expected.flatten())


@pytest.mark.parametrize("name", ["gpt2", "bert", "opt", "gpt_neox"])
def test_a_stray_number_of_groups_in_the_config_counts_for_nothing(name: str) -> None:
    stray, plain = family_model(name, num_key_value_heads=1), family_model(name)
    assert counts_of(stray) == counts_of(plain)
    assert dims_of(stray.config) == dims_of(plain.config)
