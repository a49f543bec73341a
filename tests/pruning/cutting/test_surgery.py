"""Removal: which weights stay, the lineage over rounds, and that the student is a whole model that learns."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from builders.families import (
    HIDDEN,
    QUERIES,
    assert_equal,
    family_batch,
    family_model,
    groups_of,
    neurons_of,
    outputs_of,
    uneven_plan,
    uniform_plan,
)
from builders.grids import slow
from builders.models import random_batch, tiny_model
from builders.pruning import UNEVEN, layers_in, linears_in, plan_of
from torch import nn
from transformers import LlamaForCausalLM

from distill_llm.architectures.lineage import lineage_of
from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.masking import masked
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan
from distill_llm.pruning.units.sizes import counts_of, hidden_size


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
    assert lineage_of(once).layers == tuple(LayerPlan(i, tuple(h), tuple(n)) for i, h, n in UNEVEN)
    second = [(0, (1,), (0, 2, 34)), (2, (1, 3), ()), (3, (0,), (1, 2))]
    twice = prune(once, plan_of(once, second))
    expected = (LayerPlan(0, (3,), (5, 7, 39)), LayerPlan(3, (1, 3), ()), LayerPlan(4, (2,), (8, 63)))
    assert lineage_of(twice).layers == expected
    at_once = prune(model, PruningPlan("bert", expected))
    batch = random_batch(model)
    with torch.no_grad():
        assert torch.equal(twice(**batch).logits, at_once(**batch).logits)
    assert lineage_of(once).layers == tuple(LayerPlan(i, tuple(h), tuple(n)) for i, h, n in UNEVEN), (
        "its input is untouched"
    )


ROUNDS = ["bert", "modernbert", "deberta-v2", "llama", "phi3", "gpt2-scaled", "falcon-grouped"]
ROUNDS += slow("mpnet", "olmo2", "cohere", "stablelm", "gpt_neox", "bloom", "falcon-alibi", "falcon-multi-query")


@pytest.mark.parametrize("name", ROUNDS)
def test_two_rounds_equal_one_with_the_composed_plan(name):
    model = family_model(name)
    groups, neurons = groups_of(model), neurons_of(model)
    shared, heads, channels = QUERIES // groups, [*range(groups)][-2:], range(0, HIDDEN - 2)
    queries = [h * shared + i for h in heads for i in range(shared)]
    if shared > 1:  # all but the first of every group
        queries = [h * shared + i for h in heads for i in range(1, shared)]
    first = plan_from(name, [(i, heads, range(0, neurons - 4), queries) for i in (0, 1, 3, 4)], channels)
    last = [queries[len(queries) // len(heads) * (len(heads) - 1) :][-1]]  # of the last group, its last query
    ends = (range(0, neurons - 4, 3), range(0, HIDDEN - 2, 2))
    second = plan_from(
        name,
        [(0, [len(heads) - 1], ends[0], [len(queries) - 1]), (1, [], ends[0], None), (3, [len(heads) - 1], [], None)],
        ends[1],
    )
    of_last = [query for query in queries if query // shared == heads[-1]]
    composed = plan_from(
        name, [(0, heads[-1:], ends[0], last), (1, [], ends[0], None), (4, heads[-1:], [], of_last)], ends[1]
    )
    twice, once, batch = prune(prune(model, first), second), prune(model, composed), family_batch(model)
    assert lineage_of(twice) == lineage_of(once) and lineage_of(twice).hidden == tuple(ends[1])
    assert torch.equal(outputs_of(twice, batch), outputs_of(once, batch))
    between = prune(model, first)
    with masked(between, second):
        expected = outputs_of(between, batch)
    assert_equal(outputs_of(twice, batch), expected)


def plan_from(name, rows, hidden=None) -> PruningPlan:
    """A plan from (source, heads, neurons, queries) rows."""
    kept = [LayerPlan(i, tuple(h), tuple(n), None if q is None else tuple(q)) for i, h, n, q in rows]
    family, channels = family_model(name).config.model_type, None if hidden is None else tuple(hidden)
    return PruningPlan(family, tuple(kept), hidden=channels)


@pytest.mark.parametrize("units", ["heads", "queries", "neurons", "layers", "hidden"])
def test_a_student_that_became_stock_can_be_pruned_again(units):
    model = family_model("llama")
    first = uniform_plan(model, units)
    between = prune(model, first)
    assert type(between) is LlamaForCausalLM
    shape, width = counts_of(between)[0], hidden_size(between)
    rows = [(0, [1], range(0, shape["neurons"], 2), None), (2, range(shape["heads"]), range(5), None)]
    twice = prune(between, plan_from("llama", rows, range(1, width)))
    rows, found = lineage_of(between).layers, lineage_of(twice)
    assert found.layers == (
        replace(rows[0], heads=rows[0].heads[1:2], neurons=rows[0].neurons[::2], queries=queries_of(twice, 0)),
        replace(rows[2], neurons=rows[2].neurons[:5]),
    )
    again = prune(model, PruningPlan("llama", found.layers, hidden=found.hidden))
    batch = family_batch(model)
    assert torch.equal(outputs_of(twice, batch), outputs_of(again, batch))


def queries_of(student, layer):
    """Query heads of the second group where its first alone stays, else None: all."""
    return lineage_of(student).layers[layer].queries and (2,)


def test_what_accelerate_wraps_around_a_teacher_does_not_reach_the_student():
    AcceleratorState._reset_state(reset_partial_state=True)  # of a training that another test did before
    teacher = family_model("llama")
    plan, batch = uneven_plan(teacher), family_batch(teacher)
    expected = outputs_of(prune(teacher, plan), batch)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    wrapped = accelerator.prepare_model(teacher)
    assert not torch.equal(outputs_of(prune(teacher, plan), batch), outputs_of(wrapped, batch))
    student = prune(wrapped, plan)
    assert torch.equal(outputs_of(student, batch), expected), "in fp32"
    for name in ("forward", "_original_forward"):
        assert name not in vars(student)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    assert torch.equal(outputs_of(student, batch), expected)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_weights_that_are_not_in_memory_are_refused():
    with torch.device("meta"):
        model = family_model("bert")
    with pytest.raises(InputError, match="model: got 'weights that are not in memory"):
        prune(model, uneven_plan(model))


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
