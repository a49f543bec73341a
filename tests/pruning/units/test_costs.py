"""Sizes, costs and module tables against parameters counted one by one."""

from dataclasses import replace

import pytest
import torch
from builders.families import ENCODERS, EVERY, HIDDEN, IMAGES, QUERIES, family_model, groups_of, narrows, neurons_of
from builders.grids import layouts_first
from builders.models import tiny_model
from builders.pruning import UNEVEN, counts, flops_of, plan_of, random_scores
from transformers import AutoConfig, AutoModel

from distill_llm.architectures.families import NotPrunable, family_of, layers_of
from distill_llm.architectures.lineage import pack_indices, unpack_indices
from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan, keep_layers
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of, head_size_of


@pytest.mark.parametrize("name", layouts_first([*EVERY, *IMAGES]))
def test_a_unit_costs_the_parameters_that_are_gone_without_it(name):
    model = family_model(name)
    groups, neurons = groups_of(model), neurons_of(model)
    shared, costs, whole = QUERIES // groups, unit_costs(model), params(model)
    assert costs.of(counts_of(model)) == pytest.approx(whole)
    one = full_plan(model)

    def gone(**changed):
        rows = (one.layers[0], replace(one.layers[1], **changed), *one.layers[2:])
        return whole - params(prune(model, replace(one, layers=rows)))

    if groups > 1:
        assert gone(heads=tuple(range(1, groups))) == pytest.approx(costs.at("heads") + shared * costs.at("queries"))
    assert gone(neurons=tuple(range(2, neurons))) == pytest.approx(2 * costs.at("neurons"))
    if shared > 1:
        kept = tuple(i for i in range(QUERIES) if i % shared)
        assert gone(queries=kept) == pytest.approx(groups * costs.at("queries"))
    if not narrows(model):
        return
    narrow = prune(model, replace(one, hidden=tuple(range(5, HIDDEN))))
    assert params(narrow) == pytest.approx(costs.of(counts_of(model), HIDDEN - 5))
    assert whole - params(narrow) == pytest.approx(5 * costs.channel(counts_of(model)))


def params(model) -> int:
    """Parameters of the layers, counted."""
    return sum(parameter.numel() for parameter in layers_of(model).parameters())


@pytest.mark.parametrize("name", layouts_first([*EVERY, *IMAGES]))
def test_a_unit_costs_the_flops_that_are_gone_without_it(name):
    model, batch, tokens = family_model(name, attn_implementation="eager"), 3, 9 if name in IMAGES else 12
    groups, neurons, shapes = groups_of(model), neurons_of(model), counts_of(model)
    shared, costs, one = QUERIES // groups, unit_costs(model, "flops", batch, tokens), full_plan(model)

    def flops(plan):
        return flops_of(prune(model, plan), tokens, batch) / (batch * tokens)

    def gone(**changed):
        return whole - flops(replace(one, layers=(one.layers[0], replace(one.layers[1], **changed), *one.layers[2:])))

    whole = flops(one)
    assert whole == pytest.approx(costs.of(shapes))
    assert gone(heads=tuple(range(1, groups))) == pytest.approx(costs.at("heads") + shared * costs.at("queries"))
    assert gone(neurons=tuple(range(2, neurons))) == pytest.approx(2 * costs.at("neurons"))
    if shared > 1:
        assert gone(queries=tuple(i for i in range(QUERIES) if i % shared)) == pytest.approx(
            groups * costs.at("queries")
        )
    if narrows(model):
        assert flops(replace(one, hidden=tuple(range(5, HIDDEN)))) == pytest.approx(costs.of(shapes, HIDDEN - 5))


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma2", "gemma3_text", "mistral", "olmo2", "falcon-grouped", "falcon-multi-query"]
)
def test_memory_is_the_bytes_of_weights_and_of_the_cache_that_a_forward_pass_leaves(name):
    """Counted on the cache's own tensors, at a length below every window; a window holds no more, however long the text."""
    model, length = family_model(name), 6
    with torch.no_grad():
        cache = model(torch.full((3, length), 5), use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    of = unit_costs(model, "memory", 3, length).of
    assert of(counts_of(model)) == pytest.approx(4 * (params(model) + held))
    windows = {"gemma2": [8, 1000, 8, 1000, 8], "gemma3_text": [8] * 5, "mistral": [8] * 5}.get(name, [1000] * 5)
    expected = 4 * (params(model) + held * sum(windows) / (5 * length))
    assert unit_costs(model, "memory", 3, 1000).of(counts_of(model)) == pytest.approx(expected)
    half, below = model.to(torch.bfloat16), family_model(name, "base")
    assert unit_costs(half, "memory", 3, 1000).of(counts_of(model)) == pytest.approx(expected / 2)
    assert unit_costs(below, "memory", 3, 1000).of(counts_of(model)) == pytest.approx(expected), "without its head too"


def test_single_queries_take_their_share_of_a_cache_that_holds_one_for_each():
    """Falcon's new architecture repeats the keys and values of a group for all its queries, then caches them."""
    model, length = family_model("falcon-grouped"), 6
    costs = unit_costs(model, "memory", 3, length)
    rows = [LayerPlan(i, tuple(range(4)), tuple(range(128)), (0, 2, 4, 6) if i == 1 else None) for i in range(5)]
    student = prune(model, PruningPlan("falcon", tuple(rows)))
    with torch.no_grad():
        caches = [each(torch.full((3, length), 5), use_cache=True).past_key_values for each in (model, student)]
    whole, left = (sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers) for cache in caches)
    gone = 4 * (params(model) - params(student) + whole - left)
    assert whole > left and gone == pytest.approx(4 * costs.at("queries", layer=1))
    assert costs.of(counts_of(student)) == pytest.approx(4 * (params(student) + left))


WINDOWS = (8, 1000, 8, 1000, 8)


def memory(model, windows) -> int:
    """Bytes of a tiny Gemma2 in fp32: its layers' weights, and keys and values (8 channels of a group) of two sequences."""
    groups = [layer.self_attn.o_proj.in_features // 16 for layer in layers_of(model)]  # of two queries each
    return 4 * (params(model) + 2 * 2 * 8 * sum(g * w for g, w in zip(groups, windows, strict=True)))


@pytest.mark.parametrize("kept", [(0, 2, 4), (0, 1, 3), (3,)], ids=str)
def test_memory_is_of_each_layers_own_window(kept):
    model = family_model("gemma2")
    plan = keep_layers(model, kept)
    student = prune(model, plan)
    left, whole = memory(student, [WINDOWS[i] for i in kept]), memory(model, WINDOWS)
    assert unit_costs(student, "memory", 2, 1000).of(counts_of(student)) == pytest.approx(left)
    assert plan.share(model, "memory", 2, 1000) == pytest.approx(left / whole)


def test_plans_for_memory_know_which_layers_hold_all_keys_and_values():
    model = family_model("gemma2")
    scores = replace(random_scores(counts_of(model)), layers=torch.tensor([1.0, 1.1, 1.2, 1.3, 1.4]))
    budget = {"cost": "memory", "batch_size": 2, "sequence_length": 1000}
    plan = plan_pruning(model, scores, 0.25, units=("layers",), **budget)
    assert [row.source for row in plan.layers] == [0, 2, 4], "those with a window are worth most for what they cost"
    for units, keep in ((("layers",), 0.6), (("heads", "neurons"), 0.5), (("attention", "neurons"), 0.5)):
        plan = plan_pruning(model, scores if units[0] != "attention" else blocks(scores), keep, units=units, **budget)
        student = prune(model, plan)
        share = memory(student, [WINDOWS[row.source] for row in plan.layers]) / memory(model, WINDOWS)
        assert plan.kept == pytest.approx(share) and share <= keep


def blocks(scores):
    return replace(scores, attention=torch.stack([row.sum() for row in scores.heads]))


@pytest.mark.parametrize(("name", "head"), [*((name, None) for name in ENCODERS), ("llama", "sequence-classification")])
def test_what_generates_nothing_has_no_cache_in_its_memory(name, head):
    model = family_model(name, head)
    assert unit_costs(model, "memory", 3, 1000).of(counts_of(model)) == pytest.approx(4 * params(model))


def test_sizes_of_a_pruned_model_are_its_own_and_the_head_size_stays():
    model = tiny_model(layers=5)
    pruned = prune(model, plan_of(model))
    assert counts_of(pruned) == [counts(len(heads), len(neurons)) for _, heads, neurons in UNEVEN]
    assert head_size_of(pruned) == head_size_of(model) == 8


def test_costs_do_not_depend_on_which_layer_has_lost_its_attention_or_its_ffn():
    model = tiny_model(layers=5)
    for rows in ([(1, (), range(9)), *UNEVEN[2:]], [(1, (2,), ()), *UNEVEN[2:]]):
        pruned, costs = unit_costs(prune(model, plan_of(model, rows))), unit_costs(model)
        for kind in ("heads", "queries", "neurons"):
            assert pruned.at(kind) == pytest.approx(costs.at(kind))
        assert pruned.of([counts(0, 0)]) == pytest.approx(costs.of([counts(0, 0)]))


def test_an_unknown_cost_is_refused():
    with pytest.raises(InputError, match="cost: got 'flop'; accepted: 'flops'"):
        unit_costs(tiny_model(), "flop")


def test_a_family_without_a_row_gets_a_line_that_says_how_to_add_one():
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = AutoModel.from_config(AutoConfig.for_model("nystromformer", **sizes))
    with pytest.raises(ValueError, match="nystromformer.*FAMILIES in distill_llm/architectures/families.py") as caught:
        family_of(model)
    assert "\n" not in str(caught.value)
    assert len(layers_of(model)) == 2, "layers are found without a row"


@pytest.mark.parametrize(
    ("family", "part"),
    [
        ("bert", {"add_cross_attention": True, "is_decoder": True}),
        ("gpt2", {"add_cross_attention": True}),
    ],
)
def test_models_with_parts_that_a_row_does_not_tell_of_are_refused(family, part):
    with pytest.raises(NotPrunable, match=f"model: got '{family}' with {next(iter(part))}") as caught:
        counts_of(family_model(family, "base", **part))
    assert str(caught.value) == f"model: got {caught.value.given}; accepted: {caught.value.accepted}"


def test_a_quantized_model_is_refused():
    model = tiny_model()
    model.is_quantized = True
    with pytest.raises(InputError, match="prune first, then quantize"):
        counts_of(model)


@pytest.mark.parametrize(
    ("indices", "text"), [((), ""), ((4,), "4"), ((0, 3, 4, 5), "0,3-5"), ((0, 1, 10, 11, 13), "0-1,10-11,13")]
)
def test_indices_are_written_as_ranges_and_read_back(indices, text):
    assert pack_indices(indices) == text
    assert unpack_indices(text) == indices
