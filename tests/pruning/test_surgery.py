"""Removal: which weights stay, the lineage over rounds, and that the student is a whole model that learns."""

import pytest
import torch
from helpers import random_batch, tiny_model
from pruning_examples import UNEVEN, layers_in, linears_in, plan_of
from torch import nn
from transformers import BertForSequenceClassification

from distill_llm.pruning.modeling_pruned import LayerLineage, lineage_of
from distill_llm.pruning.plan import full_plan, keep_layers
from distill_llm.pruning.surgery import prune


def test_a_layer_without_attention_and_ffn_keeps_both_output_biases():
    model = tiny_model(layers=1)
    layer, x = layers_in(prune(model, plan_of(model, [(0, (), ())])))[0], torch.randn(2, 5, 32)
    old = layers_in(model)[0]
    between = old.attention.output.LayerNorm(x + old.attention.output.dense.bias)
    expected = old.output.LayerNorm(between + old.output.dense.bias)
    found = layer(x)
    torch.testing.assert_close(found[0] if isinstance(found, tuple) else found, expected)
    assert not torch.allclose(old.attention.output.LayerNorm(x), between, atol=0.01), "the biases matter"


def test_kept_weights_are_the_rows_and_columns_the_plan_names():
    model = tiny_model(layers=5)
    student = prune(model, plan_of(model))
    _, heads, neurons = UNEVEN[0]
    channels = [h * 8 + c for h in heads for c in range(8)]
    old, new = layers_in(model)[0], layers_in(student)[0]
    for name in ("query", "key", "value"):
        assert torch.equal(getattr(new.attention.self, name).weight, getattr(old.attention.self, name).weight[channels])
        assert torch.equal(getattr(new.attention.self, name).bias, getattr(old.attention.self, name).bias[channels])
    assert torch.equal(new.attention.output.dense.weight, old.attention.output.dense.weight[:, channels])
    assert torch.equal(new.intermediate.dense.weight, old.intermediate.dense.weight[list(neurons)])
    assert torch.equal(new.output.dense.weight, old.output.dense.weight[:, list(neurons)])
    assert torch.equal(new.output.dense.bias, old.output.dense.bias)


def test_the_student_shares_no_memory_with_the_model_it_was_made_from():
    model = tiny_model()
    student = prune(model, full_plan(model))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(p.any() for n, p in model.named_parameters() if not n.endswith(("LayerNorm.bias", "layer_norm.bias")))
    assert lineage_of(model) is None, "the model's config is not written to"


def test_lineage_after_two_rounds_names_the_original_teachers_layers_heads_and_neurons():
    model = tiny_model(layers=5)
    once = prune(model, plan_of(model))
    assert lineage_of(once) == tuple(LayerLineage(i, tuple(h), tuple(n)) for i, h, n in UNEVEN)
    second = [(0, (1,), (0, 2, 34)), (2, (1, 3), ()), (3, (0,), (1, 2))]
    twice = prune(once, plan_of(once, second))
    expected = (LayerLineage(0, (3,), (5, 7, 39)), LayerLineage(3, (1, 3), ()), LayerLineage(4, (2,), (8, 63)))
    assert lineage_of(twice) == expected
    at_once = prune(model, plan_of(model, expected))
    batch = random_batch(model)
    with torch.no_grad():
        assert torch.equal(twice(**batch).logits, at_once(**batch).logits)
    assert lineage_of(once) == tuple(LayerLineage(i, tuple(h), tuple(n)) for i, h, n in UNEVEN), (
        "its input is untouched"
    )


def test_a_student_is_a_stock_class_only_where_a_stock_config_says_its_sizes():
    model = tiny_model(layers=5)
    everything, half = range(4), range(0, 64, 2)
    stock = {
        "layers": keep_layers(model, [0, 3]),
        "uniform neurons": plan_of(model, [(i, everything, half) for i in range(5)]),
    }
    other = {
        "fewer heads": plan_of(model, [(i, (0, 1), range(64)) for i in range(5)]),
        "uneven neurons": plan_of(model, [(i, everything, range(30 + i)) for i in range(5)]),
        "no FFN": plan_of(model, [(i, everything, ()) for i in range(5)]),
    }
    for plan in stock.values():
        assert type(prune(model, plan)) is BertForSequenceClassification
    for plan in other.values():
        student = prune(model, plan)
        assert type(student).__name__ == "PrunedBertForSequenceClassification"
        assert isinstance(student, BertForSequenceClassification)
    uneven = prune(model, other["uneven neurons"])
    assert (
        type(prune(uneven, plan_of(uneven, [(i, everything, half[:10]) for i in range(5)])))
        is BertForSequenceClassification
    )


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_gradients_reach_every_parameter_and_checkpointing_gives_the_same(family):
    off = {"dropout": 0.0, "seq_classif_dropout": 0.0, "attention_dropout": 0.0}
    off |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_model(family, layers=5, **off)
    plain, saving = (prune(model, plan_of(model)).train() for _ in range(2))
    saving.gradient_checkpointing_enable()
    batch = random_batch(model)
    for student in (plain, saving):
        student(**batch).loss.backward()
    for (name, one), other in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if one.numel():
            # A key bias moves all scores of a query alike: its gradient is rounding.
            assert one.grad is not None and (one.grad.any() or "k" in name.split(".")[-2]), name
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
def test_tied_embeddings_stay_tied(family):
    model = tiny_model(family, "masked-lm", layers=5)
    student = prune(model, plan_of(model))
    tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, student)]
    assert tied == [True, True]
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    assert not torch.equal(student.get_input_embeddings().weight, model.get_input_embeddings().weight)


def test_mode_dtype_and_labels_are_handed_on():
    model = tiny_model(layers=5, num_labels=3, dtype=torch.bfloat16).to(torch.bfloat16).train()
    student = prune(model, plan_of(model))
    assert student.training
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert student.config.num_labels == 3
    assert all(isinstance(m, nn.Linear) for pair in linears_in(student) for m in pair)
