"""Plans: budgets checked by counting what the pruned model has left, choices by brute force."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from builders.families import family_model
from builders.models import tiny_model
from builders.pruning import UNEVEN, flops_of, layer_params, plan_of, random_scores

from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan, keep_layers
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of

TOKENS = 16


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=4, intermediate=128, attn_implementation="eager")


@pytest.fixture(scope="module")
def uneven():
    """A model that was pruned before: 2, 0, 4 and 1 heads; 35, 22, 0 and 3 neurons."""
    dense = tiny_model(layers=5, attn_implementation="eager")
    return prune(dense, plan_of(dense))


def counted(model, plan, cost="params") -> float:
    """The share of the layers' cost that is left, counted on the pruned model."""
    pruned = prune(model, plan)
    if cost == "flops":
        return flops_of(pruned, TOKENS) / flops_of(model, TOKENS)
    return layer_params(pruned) / layer_params(model)


def scores_of(model, criterion="fisher", seed=0):
    return random_scores(counts_of(model), criterion, seed)


@pytest.mark.grid(2)
@pytest.mark.parametrize("cost", ["params", "flops"])
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"criterion": "taylor"},
        {"scope": "local"},
        {"criterion": "taylor", "scope": "local"},
        {"uniform": True},
        {"units": ("heads", "neurons", "layers")},
        {"round_to": 4},
    ],
    ids=str,
)
def test_budgets_are_met_within_one_percent_and_never_passed(model, options, keep, cost):
    options = dict(options)
    scores = scores_of(model, options.pop("criterion", "fisher"))
    plan = plan_pruning(model, scores, keep, cost=cost, sequence_length=TOKENS, **options)
    left = counted(model, plan, cost)
    assert plan.kept == pytest.approx(left)
    assert left <= keep * (1 + 1e-9)
    if options.get("round_to", 1) == 1 and not options.get("uniform"):
        assert left >= 0.99 * keep
        assert plan.note is None
    assert (plan.note is not None) == (left < 0.99 * keep)


@pytest.mark.parametrize(
    ("units", "scope", "criterion"),
    [
        *product([("heads",), ("neurons",), ("layers",)], ["global", "local"], ["fisher", "taylor"]),
        (("heads", "layers"), "global", "fisher"),
        (("neurons", "layers"), "global", "fisher"),
    ],
    ids=str,
)
def test_units_alone_stay_under_the_budget_and_leave_the_others_whole(model, units, scope, criterion):
    for keep in (0.95, 0.85, 0.8):
        plan = plan_pruning(model, scores_of(model, criterion), keep, units=units, scope=scope)
        left = counted(model, plan)
        assert left <= keep * (1 + 1e-9)
        assert (plan.note is not None) == (left < 0.99 * keep), (
            "a budget missed by more than 1% is explained, and only then"
        )
        if "heads" not in units:
            assert all(len(row.heads) == 4 for row in plan.layers)
        if "neurons" not in units:
            assert all(len(row.neurons) == 128 for row in plan.layers)
        if "layers" not in units:
            assert len(plan.layers) == 4


def test_pruned_models_can_be_planned_again(uneven):
    for options in ({}, {"scope": "local"}, {"criterion": "taylor"}, {"criterion": "taylor", "scope": "local"}):
        options = dict(options)
        plan = plan_pruning(uneven, scores_of(uneven, options.pop("criterion", "fisher")), 0.6, **options)
        left = counted(uneven, plan)
        assert 0.99 * 0.6 <= left <= 0.6


def test_heads_never_take_more_than_the_budget_where_few_neurons_could_make_up_for_them():
    model = tiny_model(intermediate=8)
    for keep in (0.5, 0.4, 0.3):
        plan = plan_pruning(model, scores_of(model), keep, scope="local")
        assert counted(model, plan) <= keep
    with pytest.raises(InputError, match="keep: got 0.2; accepted: at least 0.2"):  # a head of four in each layer
        plan_pruning(model, scores_of(model), 0.2, scope="local")


def greedy(model, scores, keep):
    """Global choice by brute force: of all that may go, take the least score per parameter, one at a time."""
    left = {("heads", i, j): v / 1048 for i, row in enumerate(scores.heads) for j, v in enumerate(row.tolist())}
    left |= {("neurons", i, j): v / 65 for i, row in enumerate(scores.neurons) for j, v in enumerate(row.tolist())}
    price = {"heads": 4 * 8 * 32 + 3 * 8, "neurons": 2 * 32 + 1}
    size, gone = layer_params(model), []
    budget = keep * size
    while size > budget:
        worst = min(left, key=left.get)
        gone.append(worst)
        size -= price[worst[0]]
        del left[worst]
    for unit in reversed(gone):  # the last one removed may have been too big: what still fits comes back
        if size + price[unit[0]] <= budget:
            left[unit] = 0
            size += price[unit[0]]
    return {(kind, i, j) for kind, i, j in left}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.8, 0.55, 0.3])
def test_global_fisher_removes_the_least_score_per_parameter_first(keep, seed):
    model = tiny_model(layers=2)
    scores = scores_of(model, seed=seed)
    plan = plan_pruning(model, scores, keep)
    kept = {("heads", row.source, j) for row in plan.layers for j in row.heads}
    kept |= {("neurons", row.source, j) for row in plan.layers for j in row.neurons}
    assert kept == greedy(model, scores, keep)


def test_global_scope_keeps_the_best_of_each_kind_over_all_layers(model):
    scores = scores_of(model, "taylor")
    plan = plan_pruning(model, scores, 0.5)
    for kind in ("heads", "neurons"):
        values = getattr(scores, kind)
        kept = [float(values[row.source][j]) for row in plan.layers for j in getattr(row, kind)]
        every = sorted(torch.cat(values).tolist(), reverse=True)
        assert sorted(kept, reverse=True) == every[: len(kept)]
        assert len(kept) / len(every) == pytest.approx(0.5, abs=0.07), "each kind keeps the same share"


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_local_scope_keeps_the_best_of_each_layer_and_the_same_share_of_each(model, criterion):
    scores = scores_of(model, criterion)
    plan = plan_pruning(model, scores, 0.5, scope="local")
    assert [len(row.heads) for row in plan.layers] == [2] * 4
    widths = [len(row.neurons) for row in plan.layers]
    assert max(widths) - min(widths) <= 4
    for row in plan.layers:
        assert set(row.heads) == set(scores.heads[row.source].topk(2).indices.tolist())
        assert set(row.neurons) == set(scores.neurons[row.source].topk(len(row.neurons)).indices.tolist())


def test_uniform_plans_give_every_layer_the_same_numbers(model, uneven):
    for given in (model, prune(model, plan_of(model, [(i, range(4), range(20 + i)) for i in range(4)]))):
        plan = plan_pruning(given, scores_of(given), 0.5, uniform=True)
        assert len({(len(row.heads), len(row.neurons)) for row in plan.layers}) == 1
        assert counted(given, plan) <= 0.5
    alone = plan_pruning(model, scores_of(model), 0.5, units=("neurons",), uniform=True)
    assert type(prune(model, alone)) is type(model), "uniform neurons: a stock class"


@pytest.mark.parametrize("scope", ["global", "local"])
@pytest.mark.parametrize("step", [8, 16])
def test_neurons_stay_in_multiples(model, step, scope):
    scores = scores_of(model)
    plan = plan_pruning(model, scores, 0.6, round_to=step, scope=scope)
    assert all(len(row.neurons) % step == 0 for row in plan.layers)
    for row in plan.layers:
        assert set(row.neurons) == set(scores.neurons[row.source].topk(len(row.neurons)).indices.tolist())
    left = counted(model, plan)
    one_block = step * 65 / layer_params(model)
    assert 0.6 - one_block < left <= 0.6, "no further block fits"


def test_layers_alone_go_by_the_least_score(model):
    scores = replace(
        scores_of(model, "block_influence"), heads=(), neurons=(), layers=torch.tensor([0.4, 0.1, 0.3, 0.2])
    )
    plan = plan_pruning(model, scores, 0.5, units=("layers",))
    assert [row.source for row in plan.layers] == [0, 2]
    assert plan.note is None
    short = plan_pruning(model, scores, 0.6, units=("layers",))
    assert [row.source for row in short.layers] == [0, 2]
    assert "0.5" in short.note
    assert "0.6" in short.note


def test_a_layer_goes_whole_where_its_score_per_parameter_is_least(model):
    scores = scores_of(model)
    scores = replace(scores, layers=torch.tensor([1e9, 0.0, 1e9, 1e9]))
    plan = plan_pruning(model, scores, 0.6, units=("heads", "neurons", "layers"))
    assert [row.source for row in plan.layers] == [0, 2, 3]


def test_keeping_everything_removes_nothing(model):
    for scope in ("global", "local"):
        plan = plan_pruning(model, scores_of(model), 1.0, scope=scope)
        assert plan == full_plan(model)


@pytest.mark.parametrize(
    ("keep", "options", "words"),
    [
        (0, {}, "keep: got 0;"),
        (1.7, {}, "keep: got 1.7; accepted: a share above 0 and at most 1"),
        (0.3, {"units": ("heads",)}, "keep: got 0.3; accepted: at least 0\\.\\d+ when only heads"),
        (0.3, {"units": ("heads",), "scope": "local"}, "keep: got 0.3;"),
        (0.2, {"units": ("neurons",)}, "keep: got 0.2;"),
        (0.001, {}, "keep: got 0.001;"),
        (0.001, {"scope": "local"}, "keep: got 0.001;"),
        (0.1, {"units": ("layers",)}, "keep: got 0.1; accepted: at least 0.25"),
        (0.5, {"units": ("head",)}, "units: got \\['head'\\]"),
        (0.5, {"units": ()}, "units: got \\[\\]"),
        (0.5, {"scope": "all"}, "scope: got 'all'; accepted: .*one of global, local"),
        (0.5, {"round_to": 0}, "round_to: got 0"),
        (0.5, {"cost": "latencies"}, "cost: got 'latencies'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_in_one_line(model, keep, options, words):
    with pytest.raises(InputError, match=words) as caught:
        plan_pruning(model, scores_of(model), keep, **options)
    assert "\n" not in str(caught.value)


def test_scores_that_do_not_fit_are_refused(model):
    blocks = replace(scores_of(model, "block_influence"), heads=(), neurons=())
    with pytest.raises(InputError, match="criterion: got 'block_influence'"):
        plan_pruning(model, blocks, 0.5)
    with pytest.raises(InputError, match="scores of this model"):
        plan_pruning(model, scores_of(tiny_model()), 0.5)
    with pytest.raises(InputError, match="criterion: got 'taylor'; set it to fisher or gisp if units has ffn"):
        plan_pruning(model, scores_of(model, "taylor"), 0.5, units=("heads", "ffn"))


def test_named_layers_stay_whole(model):
    plan = keep_layers(model, [0, 2])
    assert plan.layers == (full_plan(model).layers[0], full_plan(model).layers[2])
    assert plan.kept == pytest.approx(0.5)
    for wrong in ([0, 4], [2, 0], []):
        with pytest.raises(InputError):
            keep_layers(model, wrong)


def test_budgets_count_the_queries_that_each_layer_has_left():
    dense = family_model("llama")
    every, whole = (0, 1, 2, 3), tuple(range(64))
    rows = [LayerPlan(0, every, whole), *(LayerPlan(i, every, whole, (0, 2, 4, 6)) for i in range(1, 5))]
    student = prune(dense, PruningPlan("llama", tuple(rows)))

    def params(model):
        return sum(p.numel() for p in model.model.layers.parameters())

    costs = unit_costs(student)
    assert costs.of(counts_of(student)) == params(student)
    assert full_plan(student).share(student) == 1.0
    plan = keep_layers(student, [0, 1])
    assert plan.kept == pytest.approx(params(prune(student, plan)) / params(student))


def test_share_is_what_is_left_when_counted():
    model = tiny_model(layers=5, attn_implementation="eager")
    plan = plan_of(model, UNEVEN)
    assert plan.share(model) == pytest.approx(counted(model, plan))
    assert plan.share(model, "flops", sequence_length=TOKENS) == pytest.approx(counted(model, plan, "flops"))
