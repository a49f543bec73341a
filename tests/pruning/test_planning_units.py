"""Plans over every kind of unit: budgets counted on the pruned model, choices by brute force."""

import pytest
import torch
from family_examples import HIDDEN, family_batch, family_model

from distill_llm.errors import InputError
from distill_llm.pruning.choice import Limits
from distill_llm.pruning.collecting import collect_statistics
from distill_llm.pruning.criteria import score
from distill_llm.pruning.families import layers_of
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning import plan_pruning
from distill_llm.pruning.structure import hidden_size, sizes_of, unit_costs
from distill_llm.pruning.surgery import prune

EVERY = ("heads", "queries", "neurons", "layers", "attention", "ffn", "hidden")


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert", "olmo2", "falcon-grouped"])
def case(request):
    model = family_model(request.param)
    batch = family_batch(model)
    statistics = collect_statistics(model, [batch], "kl")
    return model, statistics


def layer_params(model) -> int:
    return sum(p.numel() for p in layers_of(model).parameters())


@pytest.mark.parametrize("keep", [0.8, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"units": EVERY},
        {"units": ("hidden",)},
        {"units": ("hidden", "neurons")},
        {"units": ("heads", "queries", "neurons", "hidden"), "round_to": 4},
        {"units": ("heads", "neurons", "hidden"), "uniform": True},
        {"units": ("heads", "neurons", "hidden"), "scope": "local", "criterion": "taylor"},
        {"units": ("attention", "ffn", "neurons")},
    ],
    ids=str,
)
def test_budgets_hold_for_what_is_left_of_the_pruned_model(case, options, keep):
    model, statistics = case
    options = dict(options)
    plan = plan_pruning(model, score(statistics, options.pop("criterion", "fisher")), keep, **options)
    student = prune(model, plan)
    share = layer_params(student) / layer_params(model)
    assert share == pytest.approx(plan.kept, abs=1e-6), "the plan knows what it costs"
    coarse = options["units"] == ("hidden",) or "round_to" in options
    assert share <= keep + 1e-9
    assert plan.note is not None or share >= keep * 0.99
    assert coarse or share >= keep * 0.95
    if "hidden" in options["units"] and options.get("uniform"):
        assert hidden_size(student) < HIDDEN
    if options.get("uniform"):
        assert len(set(sizes_of(student))) == 1


def test_memory_counts_weights_and_the_keys_and_values_of_a_context(case):
    model, _ = case
    length = 50
    sizes = sizes_of(model)
    head_size = HIDDEN // 8
    cache = sum(2 * size.groups * head_size * length for size in sizes)
    expected = 4 * (layer_params(model) + cache)
    costs = unit_costs(model, "memory", length)
    assert costs.of([(s.groups, s.neurons, s.queries) for s in sizes]) == pytest.approx(expected)


def test_what_one_unit_costs_is_what_is_gone_without_it(case):
    model, _ = case
    costs, size = unit_costs(model), sizes_of(model)[0]
    whole = layer_params(model)
    shared = size.queries // size.groups
    every = [(tuple(range(s.groups)), tuple(range(s.neurons))) for s in sizes_of(model)]

    def without(heads=None, neurons=None, queries=None, hidden=None) -> float:
        from distill_llm.pruning.plan import LayerPlan

        rows = [LayerPlan(i, h, n) for i, (h, n) in enumerate(every)]
        rows[0] = LayerPlan(0, heads or every[0][0], neurons or every[0][1], queries)
        plan = PruningPlan(model.config.model_type, tuple(rows), hidden=hidden)
        return whole - layer_params(prune(model, plan))

    assert without(heads=every[0][0][1:]) == pytest.approx(costs.head)
    assert without(neurons=every[0][1][1:]) == pytest.approx(costs.neuron)
    shapes = [(s.groups, s.neurons, s.queries) for s in sizes_of(model)]
    assert without(hidden=tuple(range(1, HIDDEN))) == pytest.approx(costs.channel(shapes))
    if shared > 1:
        queries = tuple(q for q in range(size.queries) if q % shared)
        assert without(queries=queries) == pytest.approx(size.groups * costs.query_at())


def test_limits_hold_in_every_layer(case):
    model, statistics = case
    for options in ({}, {"criterion": "taylor"}, {"scope": "local"}):
        options = dict(options)
        scores = score(statistics, options.pop("criterion", "fisher"))
        plan = plan_pruning(model, scores, 0.5, limits=Limits(heads=1, neurons=12), **options)
        assert all(len(row.heads) >= 1 and len(row.neurons) >= 12 for row in plan.layers)


def test_limits_hold_when_neurons_are_rounded_and_the_budget_too():
    model = family_model("llama")
    scores = score(collect_statistics(model, [family_batch(model)], "kl"))
    plan = plan_pruning(model, scores, 0.35, round_to=16, limits=Limits(neurons=20))
    assert all(len(row.neurons) >= 20 and len(row.neurons) % 16 == 0 for row in plan.layers)
    assert plan.kept <= 0.35 + 1e-9


def test_queries_go_equally_from_every_group_and_the_least_first():
    model = family_model("llama")
    scores = score(collect_statistics(model, [family_batch(model)], "kl"))
    plan = plan_pruning(model, scores, 0.93, units=("queries",))
    for i, row in enumerate(plan.layers):
        if row.queries is None:
            continue
        best = scores.queries[i].view(4, 2).argmax(1)
        assert row.queries == tuple(2 * g + int(best[g]) for g in range(4))
    assert any(row.queries is not None for row in plan.layers)


def test_the_least_score_per_current_cost_goes_first():
    """Against a slow loop that looks at all that is left in every step."""
    model = family_model("llama")
    scores = score(collect_statistics(model, [family_batch(model)], "kl"))
    costs = unit_costs(model)
    shapes = [[s.groups, s.neurons] for s in sizes_of(model)]
    width, budget = HIDDEN, 0.6 * costs.of(shapes)
    left = {("heads", i, j): float(v) for i, row in enumerate(scores.heads) for j, v in enumerate(row)}
    left |= {("neurons", i, j): float(v) for i, row in enumerate(scores.neurons) for j, v in enumerate(row)}
    left |= {("hidden", 0, j): float(v) for j, v in enumerate(scores.hidden)}
    gone = set()

    def price(kind):
        if kind == "hidden":
            return costs.channel(shapes)
        return costs.neuron_at(width) if kind == "neurons" else costs.group_at(width) + 2 * costs.query_at(width)

    while costs.of(shapes, width) > budget:
        prices = {kind: price(kind) for kind in ("heads", "neurons", "hidden")}
        unit = min(left, key=lambda u: left[u] / prices[u[0]])
        del left[unit]
        if unit[0] == "hidden" and costs.of(shapes, width) - prices["hidden"] < 0.99 * budget:
            continue
        gone.add(unit)
        if unit[0] == "hidden":
            width -= 1
        else:
            shapes[unit[1]][unit[0] == "neurons"] -= 1
    plan = plan_pruning(model, scores, 0.6, units=("heads", "neurons", "hidden"))
    mine = {("hidden", 0, j) for j in range(HIDDEN) if plan.hidden is not None and j not in plan.hidden}
    mine |= {("heads", r.source, j) for r in plan.layers for j in range(4) if j not in r.heads}
    mine |= {("neurons", r.source, j) for r in plan.layers for j in range(64) if j not in r.neurons}
    assert mine <= gone, "what the last large unit took too much comes back as neurons"
    assert len(gone - mine) <= 16 and all(kind == "neurons" for kind, *_ in gone - mine)


def test_units_without_scores_are_refused():
    model = family_model("llama")
    scores = score(collect_statistics(model, [family_batch(model)], None, hidden=False), "activation")
    with pytest.raises(InputError, match="statistics collected with hidden"):
        plan_pruning(model, scores, 0.5, units=("hidden",))
    with pytest.raises(InputError, match="do not compare over kinds"):
        plan_pruning(model, scores, 0.5, units=("attention", "neurons"))
    with pytest.raises(InputError, match="keep: got 0.1"):
        plan_pruning(model, scores, 0.1, units=("attention",))
    assert torch.is_tensor(scores.attention)
