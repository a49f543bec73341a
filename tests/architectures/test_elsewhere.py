"""Pruned models in other people's hands: opened without their code, initialised anew, asked for attentions, read by config."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from builders.causal import word_tokenizer
from builders.families import (
    DECODERS,
    EVERY,
    HEADS,
    HIDDEN,
    QUERIES,
    VARIANTS,
    aligned,
    assert_equal,
    family_batch,
    family_model,
    groups_of,
    narrows,
    outputs_of,
    uneven_plan,
    uniform_plan,
)
from builders.grids import layouts_first, slow
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, PreTrainedModel, pipeline

from distill_llm.architectures.families import dims_of, family_of, layers_of
from distill_llm.architectures.modeling_pruned import pruned_class
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pruning.cutting.masking import masked
from distill_llm.pruning.cutting.surgery import prune, stock_expressible
from distill_llm.pruning.plan import PruningPlan, keep_layers

HEADED = [
    ("llama", "sequence-classification"),
    ("llama", "question-answering"),
    ("bert", "multiple-choice"),
    ("gpt2", "base"),
]
CUTS = ("heads", "neurons", "layers", "first layer", "hidden", "uneven")


def cut(model: PreTrainedModel, kind: str) -> PruningPlan | None:
    """A plan that cuts one kind of unit evenly, the first layer, or all unevenly; None where the family cannot."""
    if kind == "uneven":
        return uneven_plan(model, hidden=True, queries=True)
    if not narrows(model) and kind in ("hidden", "first layer"):
        return None
    if kind == "first layer":
        return keep_layers(model, [1, 2, 3, 4])
    if kind == "heads" and groups_of(model) == 1:
        return None
    return uniform_plan(model, kind)


def auto_of(name: str):
    family = VARIANTS[name][0] if name in VARIANTS else name
    return HEADS["causal-lm" if family in DECODERS else "sequence-classification"]


@pytest.mark.grid(1)
@pytest.mark.parametrize("kind", CUTS)
@pytest.mark.parametrize("name", layouts_first(EVERY))
def test_a_folder_opens_as_the_same_model_or_not_at_all(tmp_path, name, kind):
    """Nor does its config say another width, number of heads or of neurons than the model has."""
    model, auto = family_model(name), auto_of(name)
    plan = cut(model, kind)
    if plan is None:
        pytest.skip("the family keeps these")
    student, batch = prune(model, plan), family_batch(model)
    student.save_pretrained(tmp_path)
    trust = {}
    if not stock_expressible(student):
        for given in ({}, {"trust_remote_code": False}):
            with pytest.raises(ValueError, match="pass the argument `trust_remote_code=True`"):
                auto.from_pretrained(tmp_path, **given)
            with pytest.raises(ValueError, match="trust_remote_code=True"):
                AutoConfig.from_pretrained(tmp_path, **given)
        refusals = (ValueError, StrictDataclassError)  # of the file's name, or of sizes that the family does not take
        with pytest.raises(refusals, match=r"this model is pruned: open it with .*trust_remote_code=True|validator '"):
            type(model).from_pretrained(tmp_path)
        trust = {"trust_remote_code": True}
    loaded = aligned(auto.from_pretrained(tmp_path, **trust))
    assert_equal(outputs_of(loaded, batch), outputs_of(student, batch))
    assert loaded.config.model_type == model.config.model_type
    check_sizes(loaded, dims_of(model.config).head_size)
    assert AutoConfig.from_pretrained(tmp_path, **trust).to_dict() == loaded.config.to_dict()


def check_sizes(student: PreTrainedModel, head_size: int) -> None:
    """What the config says is what the weights have, wherever all layers have the same."""
    config, family = student.config, family_of(student)
    with torch.no_grad():
        state = student.base_model(torch.ones(1, 4, dtype=torch.long), output_hidden_states=True).hidden_states[0]
    if not family.keeps_width:
        assert config.hidden_size == state.shape[-1]
    weights = [dict(layer.named_modules())[family.ffn_out].weight for layer in layers_of(student)]
    neurons = {min(weight.shape) if 0 in weight.shape else weight.numel() // state.shape[-1] for weight in weights}
    if family.ffn_config and len(neurons) == 1:
        assert getattr(config, family.ffn_config) in neurons | {None}
    attentions = [dict(layer.named_modules())[family.attention_out].weight for layer in layers_of(student)]
    channels = {weight.numel() // state.shape[-1] for weight in attentions}
    if len(channels) == 1:
        said = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        assert said == head_size and config.num_attention_heads * head_size in channels
    assert config.num_hidden_layers == len(layers_of(student))


@pytest.mark.parametrize("name, head", [*HEADED, *slow(*(row for row in product(EVERY, HEADS) if row not in HEADED))])
def test_every_head_of_a_family_is_cut_saved_and_opened_again(tmp_path, name, head):
    """Some heads make the model below them through AutoModel."""
    try:
        model = family_model(name, head, num_labels=2)
    except ValueError:
        pytest.skip("the family has no such head")
    plan, batch = uneven_plan(model, hidden=head != "base"), family_batch(model)
    student = prune(model, plan)
    student.save_pretrained(tmp_path)
    with masked(model, plan):
        expected = outputs_of(model, batch)
    loaded = HEADS[head].from_pretrained(tmp_path, trust_remote_code=True)
    for each in (loaded, load_pretrained(tmp_path)):
        assert_equal(outputs_of(aligned(each), batch), expected)
    twice = (prune(each, keep_layers(each, [0, 1])) for each in (loaded, student))
    assert_equal(*(outputs_of(each, batch) for each in twice))


@pytest.mark.parametrize("name", layouts_first(EVERY))
def test_a_new_model_of_a_pruned_config_is_initialised_as_the_original_is(name):
    """By cutting a stock model that was made with the same seed, on the CPU; on the meta device nothing is made."""
    model = family_model(name)
    plan = uneven_plan(model, hidden=True, queries=True)
    student = prune(model, plan)
    torch.manual_seed(5)
    fresh = type(model)._from_config(model.config)
    torch.manual_seed(5)
    found = type(student)._from_config(student.config)
    expected = prune(fresh, plan).state_dict()
    assert found.state_dict().keys() == expected.keys()
    for key, value in found.state_dict().items():
        assert torch.equal(value, expected[key]), key
    with torch.device("meta"):
        empty = type(student)._from_config(student.config)
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_pruned_model_is_not_opened_with_another_number_of_layers_than_it_has(tmp_path):
    """Its config would say one and its layers the other."""
    model = family_model("llama")
    prune(model, uneven_plan(model)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="^num_hidden_layers: got 2; leave it out: this pruned model has 4 layers$"):
        auto_of("llama").from_pretrained(tmp_path, trust_remote_code=True, num_hidden_layers=2)
    with pytest.raises(ValueError, match="^config: PrunedLlamaForCausalLM needs that of a pruned model"):
        pruned_class(type(model))(model.config)


def test_an_uncut_model_of_a_pruned_class_is_the_stock_class_to_the_last_bit(tmp_path):
    model = family_model("bert")
    student = prune(model, uneven_plan(model))
    student.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)
    whole = {"source": 0, "heads": f"0-{QUERIES - 1}", "neurons": "0-63"}
    config.num_hidden_layers, config.pruning = 5, config.pruning | {"layers": [whole | {"source": i} for i in range(5)]}
    for make in (
        lambda c: HEADS["sequence-classification"].from_config(c, trust_remote_code=True),
        pruned_class(type(model)),
    ):
        torch.manual_seed(3)
        found = make(config).state_dict()
        torch.manual_seed(3)
        expected = type(model)._from_config(BertConfig(**model.config.to_dict())).state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("head", [None, "base"])
@pytest.mark.parametrize("name", layouts_first(EVERY))
def test_attentions_and_hidden_states_are_at_the_place_of_their_layer(name, head):
    """Layer 1 has no attention, layer 2 of the original is gone; the same heads of the masked model see the same."""
    model = family_model(name, head, attn_implementation="eager")
    plan = uneven_plan(model, hidden=True, queries=True)
    batch, asked = family_batch(model), {"output_attentions": True, "output_hidden_states": True}
    student = prune(model, plan)
    with torch.no_grad():
        found, whole = student(**batch, **asked), student(**batch)
        with masked(model, plan):
            expected = model(**batch, **asked)
    assert "attentions" not in whole
    shared = QUERIES // groups_of(model)
    assert [each is None for each in found.attentions] == [False, True, False, False]
    valid = batch["attention_mask"].bool()
    for row, attention in zip(plan.layers, found.attentions, strict=True):
        if attention is not None:
            kept = list(row.queries or [head * shared + i for head in row.heads for i in range(shared)])
            wanted = expected.attentions[row.source][:, kept]
            assert_equal(attention.transpose(1, 2)[valid], wanted.transpose(1, 2)[valid])
    assert len(found.hidden_states) == len(plan.layers) + 1
    channels = list(range(HIDDEN) if plan.hidden is None else plan.hidden)
    for row, state in zip(plan.layers, found.hidden_states[:-1], strict=True):
        assert_equal(state[valid], expected.hidden_states[row.source][valid][:, channels])


def test_attentions_keep_their_place_in_a_tuple_after_another_cut_and_after_reload(tmp_path):
    model = family_model("llama", "base", attn_implementation="eager")
    student = prune(model, uneven_plan(model))
    second = prune(student, keep_layers(student, [0, 1, 3]))
    second.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, trust_remote_code=True, attn_implementation="eager")
    batch = family_batch(model)
    for each in (second, loaded):
        for given in ({}, {"return_dict": False}):
            output = each(**batch, output_attentions=True, use_cache=False, **given)
            attentions = output[-1] if isinstance(output, tuple) else output.attentions
            assert [None if one is None else one.shape[1] for one in attentions] == [4, None, 2]


def test_a_layer_without_any_part_has_its_place_too():
    model = family_model("bert", attn_implementation="eager")
    rows = list(uneven_plan(model).layers)
    rows[1] = replace(rows[1], neurons=())
    student = prune(model, PruningPlan("bert", tuple(rows)))
    found = student(**family_batch(model), output_attentions=True, output_hidden_states=True)
    assert len(found.hidden_states) == 5 and [each is None for each in found.attentions] == [False, True, False, False]


def test_its_tokenizer_and_pipelines_open_as_for_any_model(tmp_path):
    model = family_model("llama")
    student = prune(model, uneven_plan(model))
    student.save_pretrained(tmp_path)
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    text = "w1 w2 w3"
    for given in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        found = AutoTokenizer.from_pretrained(tmp_path, **given)
        assert found(text)["input_ids"] == tokenizer(text)["input_ids"]
    made = pipeline("text-generation", model=str(tmp_path), trust_remote_code=True)
    assert made(text, max_new_tokens=2, do_sample=False)[0]["generated_text"].startswith(text)
    loaded = load_pretrained(tmp_path)
    assert loaded.config.to_json_string() == made.model.config.to_json_string()
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["model_type"] == "pruned_llama" and loaded.config.model_type == "llama"
    assert said["auto_map"]["AutoConfig"] == "configuration_pruned.PrunedLlamaConfig"


@pytest.mark.parametrize("name", ["distilbert", *slow("bert", "modernbert")])
def test_sentence_transformers_reads_the_width_of_its_vectors(tmp_path, name):
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    model = family_model(name, "base")
    student = prune(model, PruningPlan(name, uniform_plan(model, "heads").layers, hidden=tuple(range(0, HIDDEN, 2))))
    student.save_pretrained(tmp_path)
    word_tokenizer(pad=True).save_pretrained(tmp_path)
    trust = {"trust_remote_code": True}
    module = modules.Transformer(str(tmp_path), model_kwargs=trust, config_kwargs=trust, processor_kwargs=trust)
    vectors = module(module.preprocess(["w1 w2"]))["token_embeddings"]
    assert module.get_embedding_dimension() == vectors.shape[-1] == HIDDEN // 2
