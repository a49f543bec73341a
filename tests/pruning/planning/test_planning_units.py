"""Plans over every kind of unit: budgets counted on the pruned model, choices by brute force."""

from dataclasses import replace

import pytest
import torch
from builders.families import HIDDEN, family_batch, family_model
from builders.pruning import counts

from distill_llm.architectures.families import layers_of
from distill_llm.common.errors import InputError
from distill_llm.pruning.compensation.bypass import fit_bypasses
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import score
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan, keep_layers
from distill_llm.pruning.planning import latency
from distill_llm.pruning.planning.layer_times import layer_run, layer_times
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.planning.rules import Limits
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of, hidden_size

EVERY = ("heads", "queries", "neurons", "layers", "attention", "ffn", "hidden")


@pytest.fixture(scope="module", params=["llama", "gpt2", "bert", "olmo2", "falcon-grouped"])
def case(request):
    model = family_model(request.param)
    batch = family_batch(model)
    statistics = collect_statistics(model, [batch], "kl")
    return model, statistics


def layer_params(model) -> int:
    return sum(p.numel() for p in layers_of(model).parameters())


def smallest_step(model, options) -> float:
    """The share of the layers' parameters that the smallest step of the given units takes, neurons if they may go."""
    layers, units = layers_of(model), options["units"]
    costs = unit_costs(model)
    if "neurons" in units:
        step = costs.at("neurons") * options.get("round_to", 1) * (len(layers) if options.get("uniform") else 1)
    else:
        step = costs.channel(counts_of(model))
    return step / layer_params(model)


@pytest.mark.grid(2)
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
    assert share <= keep + 1e-9
    assert share >= keep - max(0.01 * keep, smallest_step(model, options)), "as near as these units allow"
    if "hidden" in options["units"] and options.get("uniform"):
        assert hidden_size(student) < HIDDEN
    if options.get("uniform"):
        assert all(each == counts_of(student)[0] for each in counts_of(student))


@pytest.mark.grid(2)
@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
@pytest.mark.parametrize("step", [1, 4, 16])
def test_channels_in_steps_and_heads_leave_no_more_than_the_best_pair_of_numbers(case, criterion, step):
    """Against every number of heads with every width: nothing that would fit stays away, one head aside."""
    model, statistics = case
    costs, sizes = unit_costs(model), counts_of(model)
    neurons, whole = sum(s["neurons"] for s in sizes), layer_params(model)
    rest, shared = costs.of([counts(0, 0)] * len(sizes)), sizes[0]["queries"] // sizes[0]["heads"]
    assert rest < 0.1 * whole

    def share(heads, width) -> float:
        each = costs.at("heads", width) + shared * costs.at("queries", width)
        return (
            costs.of([counts(0, 0)] * len(sizes), width) + heads * each + neurons * costs.at("neurons", width)
        ) / whole

    every = [share(h, w) for h in range(sum(s["heads"] for s in sizes) + 1) for w in range(step, HIDDEN + 1, step)]
    for keep in (0.9, 0.7, 0.5, 0.4):
        options = {"units": ("heads", "hidden"), "round_to": step}
        plan = plan_pruning(model, score(statistics, criterion), keep, **options)
        left = layer_params(prune(model, plan)) / whole
        best = max(one for one in every if one <= keep + 1e-9)
        head = costs.at("heads") + shared * costs.at("queries")
        assert best - head / whole - 0.01 * keep <= left <= best + 1e-9
        assert plan.hidden is None or (len(plan.hidden) % step == 0 and plan.hidden)


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_the_last_channels_stay(case, criterion):
    model, statistics = case
    for step in (1, 16):
        with pytest.raises(InputError, match="keep: got 0.01; accepted: at least 0.*when only hidden"):
            plan_pruning(model, score(statistics, criterion), 0.01, units=("hidden",), round_to=step)


def test_what_one_unit_costs_is_what_is_gone_without_it(case):
    model, _ = case
    costs, size = unit_costs(model), counts_of(model)[0]
    whole = layer_params(model)
    shared = size["queries"] // size["heads"]
    every = [(tuple(range(s["heads"])), tuple(range(s["neurons"]))) for s in counts_of(model)]

    def without(heads=None, neurons=None, queries=None, hidden=None) -> float:
        rows = [LayerPlan(i, h, n) for i, (h, n) in enumerate(every)]
        rows[0] = LayerPlan(0, heads or every[0][0], neurons or every[0][1], queries)
        plan = PruningPlan(model.config.model_type, tuple(rows), hidden=hidden)
        return whole - layer_params(prune(model, plan))

    assert without(heads=every[0][0][1:]) == pytest.approx(costs.at("heads") + shared * costs.at("queries"))
    assert without(neurons=every[0][1][1:]) == pytest.approx(costs.at("neurons"))
    assert without(hidden=tuple(range(1, HIDDEN))) == pytest.approx(costs.channel(counts_of(model)))
    if shared > 1:
        queries = tuple(q for q in range(size["queries"]) if q % shared)
        assert without(queries=queries) == pytest.approx(size["heads"] * costs.at("queries"))


@pytest.fixture(scope="module")
def uneven():
    """A llama that was pruned before: 4, 2, 4, 1 and 3 heads (KV groups); 64, 64, 10, 40 and 20 neurons; its statistics."""
    rows = [(4, 64), (2, 64), (4, 10), (1, 40), (3, 20)]
    layers = tuple(LayerPlan(i, tuple(range(h)), tuple(range(n))) for i, (h, n) in enumerate(rows))
    model = prune(family_model("llama"), PruningPlan("llama", layers))
    return model, collect_statistics(model, [family_batch(model)], "kl")


@pytest.mark.grid(2)
@pytest.mark.parametrize("options", [{}, {"scope": "local"}, {"uniform": True}], ids=str)
@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
@pytest.mark.parametrize(
    ("units", "limits"),
    [
        (("heads",), Limits(heads=3)),
        (("neurons",), Limits(neurons=60)),
        (("heads", "neurons", "hidden"), Limits(heads=3, neurons=50)),
    ],
    ids=str,
)
def test_limits_hold_in_every_layer_down_to_what_they_allow(case, options, criterion, units, limits):
    """The budget is a little above the cost of a model cut down to its limits, so that they bind in every layer."""
    model, statistics = case
    scores, sizes = score(statistics, criterion), counts_of(model)
    heads, neurons = limits.heads if "heads" in units else None, limits.neurons if "neurons" in units else None
    rows = [LayerPlan(i, range(s["heads"])[:heads], range(s["neurons"])[:neurons]) for i, s in enumerate(sizes)]
    channels = (0,) if "hidden" in units else None
    smallest = prune(model, PruningPlan(model.config.model_type, tuple(rows), hidden=channels))
    least = layer_params(smallest) / layer_params(model)
    for keep in (least * 1.0001, min(1.0, least * 1.02)):
        plan = plan_pruning(model, scores, keep, units=units, limits=limits, **options)
        assert plan.kept <= keep + 1e-9
        assert all(len(row.heads) >= limits.heads and len(row.neurons) >= limits.neurons for row in plan.layers)
    with pytest.raises(InputError, match=f"keep: got .*; accepted: at least {least:.4f} when only"):
        plan_pruning(model, scores, least * 0.99, units=units, limits=limits, **options)


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
@pytest.mark.parametrize("scope", ["global", "local"])
def test_limits_that_small_layers_are_below_already_are_met_by_the_others(uneven, criterion, scope):
    model, statistics = uneven
    sizes = counts_of(model)
    plan = plan_pruning(model, score(statistics, criterion), 0.75, scope=scope, limits=Limits(2, 14))
    assert 0.99 * 0.75 <= layer_params(prune(model, plan)) / layer_params(model) <= 0.75
    for row, size in zip(plan.layers, sizes, strict=True):
        assert len(row.heads) >= min(2, size["heads"]) and len(row.neurons) >= min(14, size["neurons"])
    if scope == "local":
        shares = [
            len(row.neurons) / s["neurons"] for row, s in zip(plan.layers, sizes, strict=True) if s["neurons"] > 20
        ]
        assert max(shares) - min(shares) < 0.05, "but for the limits, the same share"


@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_uniform_plans_of_uneven_layers_keep_all_that_the_smallest_layer_has(uneven, criterion):
    """At most 1 head and 10 neurons: below that share nothing more goes than the budget asks."""
    model, statistics = uneven
    rows = tuple(LayerPlan(i, (0,), tuple(range(10))) for i in range(5))
    most = layer_params(prune(model, PruningPlan("llama", rows))) / layer_params(model)
    for keep in (0.9, 0.7, most):
        plan = plan_pruning(model, score(statistics, criterion), keep, uniform=True)
        assert plan.kept == pytest.approx(most)
        assert {(len(row.heads), len(row.neurons)) for row in plan.layers} == {(1, 10)}
    assert (
        "no layer keeps more than the smallest"
        in plan_pruning(model, score(statistics, criterion), 0.9, uniform=True).note
    )


@pytest.mark.parametrize("keep", [0.45, 0.3])
@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
@pytest.mark.parametrize("options", [{"scope": "local"}, {"uniform": True}], ids=str)
def test_equal_shares_leave_a_head_to_every_layer_that_has_one(one_group, options, criterion, keep):
    """One group, half of which would be none: neurons make up for it."""
    model, statistics = one_group
    plan = plan_pruning(model, score(statistics, criterion), keep, **options)
    assert {len(row.heads) for row in plan.layers} == {1}
    assert plan.note is None and 0.99 * keep <= layer_params(prune(model, plan)) / layer_params(model) <= keep
    with pytest.raises(InputError, match="at least 1.0000 when only heads"):
        plan_pruning(model, score(statistics, criterion), 0.9, units=("heads",), **options)


@pytest.mark.parametrize("options", [{"scope": "local"}, {"uniform": True}], ids=str)
def test_equal_shares_go_around_layers_without_attention_or_ffn(options):
    rows = [LayerPlan(i, tuple(range(4 * (i != 1))), tuple(range(256 * (i != 3)))) for i in range(5)]
    model = prune(family_model("llama", intermediate_size=256), PruningPlan("llama", tuple(rows)))
    scores = score(collect_statistics(model, [family_batch(model)], "kl"))
    plan = plan_pruning(model, scores, 0.7, **options)
    assert plan.note is None and 0.99 * 0.7 <= layer_params(prune(model, plan)) / layer_params(model) <= 0.7
    heads, neurons = [len(row.heads) for row in plan.layers], [len(row.neurons) for row in plan.layers]
    assert heads == [heads[0], 0, *[heads[0]] * 3] and heads[0] > 0
    assert neurons.pop(3) == 0 and max(neurons) - min(neurons) <= 4 * ("scope" in options)


@pytest.fixture(scope="module")
def one_group():
    """A decoder whose eight queries share one key."""
    model = family_model("llama-one-group", intermediate_size=256)
    return model, collect_statistics(model, [family_batch(model)], "kl")


def test_whole_layers_go_by_score_per_cost_where_layers_are_uneven(uneven):
    model, statistics = uneven
    prices = torch.tensor([sum(p.numel() for p in layer.parameters()) for layer in layers_of(model)])
    scores = replace(score(statistics, "taylor"), layers=prices * torch.tensor([1.0, 5.0, 4.0, 3.0, 2.0]))
    assert scores.layers.argmin() != 0, "the least score is another's"
    keep = 1.001 - float(prices[0] / prices.sum())
    plan = plan_pruning(model, scores, keep, units=("layers",))
    assert [row.source for row in plan.layers] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("units", "options", "line"),
    [
        (
            ("heads", "queries", "neurons"),
            {"criterion": "taylor"},
            "criterion: got 'taylor'; set it to fisher, gisp or fisher_obs if",
        ),
        (
            ("heads", "queries", "neurons"),
            {"uniform": True},
            "uniform: got True; set it to false if units has queries",
        ),
        (
            ("layers", "attention"),
            {"scope": "local"},
            "scope: got 'local'; set it to global if units has layers and",
        ),
        (("queries", "hidden"), {"scope": "local"}, "scope: got 'local'; set it to global if units has queries"),
        (
            ("layers", "ffn"),
            {"layer_criterion": "block_influence"},
            "layer_criterion: got 'block_influence'; leave it out if units has layers and ffn",
        ),
    ],
    ids=str,
)
def test_units_that_settings_would_leave_alone_are_refused(uneven, units, options, line):
    model, statistics = uneven
    options = dict(options)
    names = {name: options.pop(name) for name in ("criterion", "layer_criterion") if name in options}
    scores = score(statistics, **names)
    with pytest.raises(InputError) as caught:
        plan_pruning(model, scores, 0.7, units=units, **options)
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)


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
    shapes = counts_of(model)
    width, budget = HIDDEN, 0.6 * costs.of(shapes)
    left = {("heads", i, j): float(v) for i, row in enumerate(scores.heads) for j, v in enumerate(row)}
    left |= {("neurons", i, j): float(v) for i, row in enumerate(scores.neurons) for j, v in enumerate(row)}
    left |= {("hidden", 0, j): float(v) for j, v in enumerate(scores.hidden)}
    gone = set()

    def price(kind):
        if kind == "hidden":
            return costs.channel(shapes)
        return (
            costs.at("neurons", width)
            if kind == "neurons"
            else costs.at("heads", width) + 2 * costs.at("queries", width)
        )

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
            shapes[unit[1]][unit[0]] -= 1
            shapes[unit[1]]["queries"] = 2 * shapes[unit[1]]["heads"]
    plan = plan_pruning(model, scores, 0.6, units=("heads", "neurons", "hidden"))
    mine = {("hidden", 0, j) for j in range(HIDDEN) if plan.hidden is not None and j not in plan.hidden}
    mine |= {("heads", r.source, j) for r in plan.layers for j in range(4) if j not in r.heads}
    mine |= {("neurons", r.source, j) for r in plan.layers for j in range(64) if j not in r.neurons}
    assert mine <= gone, "what the last large unit took too much comes back as neurons"
    assert len(gone - mine) <= 16 and all(kind == "neurons" for kind, *_ in gone - mine)


def test_units_without_scores_are_refused():
    model = family_model("llama")
    scores = score(
        collect_statistics(model, [family_batch(model)], None, settings=CalibrationSettings(hidden=False)), "activation"
    )
    with pytest.raises(InputError, match="statistics collected with hidden"):
        plan_pruning(model, scores, 0.5, units=("hidden",))
    with pytest.raises(InputError, match="fisher or gisp if units has attention together"):
        plan_pruning(model, scores, 0.5, units=("attention", "neurons"))
    with pytest.raises(InputError, match="keep: got 0.1"):
        plan_pruning(model, scores, 0.1, units=("attention",))
    assert torch.is_tensor(scores.attention)


@pytest.mark.parametrize(
    ("keep", "units", "options"),
    [
        (0.5, ("layers", "heads", "neurons"), {"uniform": True}),
        pytest.param(0.6, ("layers", "neurons"), {"uniform": True, "round_to": 4}, marks=pytest.mark.slow),
        (0.5, ("layers", "heads", "neurons", "hidden"), {"uniform": True}),
        pytest.param(0.5, ("layers", "heads", "neurons"), {"scope": "local"}, marks=pytest.mark.slow),
        (0.7, ("layers", "heads", "neurons"), {"criterion": "taylor", "layer_criterion": None}),
    ],
    ids=str,
)
def test_depth_and_width_go_in_one_plan_layers_by_a_criterion_of_their_own(deep, keep, units, options):
    model, statistics = deep
    options = {"criterion": "activation", "layer_criterion": "block_influence"} | options
    names = {name: options.pop(name) for name in ("criterion", "layer_criterion")}
    scores = score(statistics, **names)
    plan = plan_pruning(model, scores, keep, units=units, **options)
    student = prune(model, plan)
    count, total = len(layers_of(student)), len(layers_of(model))
    share = layer_params(student) / layer_params(model)
    assert share == pytest.approx(plan.kept, abs=1e-6) and share <= keep + 1e-9
    by_layers = score(statistics, names["layer_criterion"] or names["criterion"]).layers
    best = by_layers.argsort(descending=True)[:count].sort().values.tolist()
    assert [row.source for row in plan.layers] == best, "the layers that stay are the best"
    assert count < total
    widths = {kind: [len(getattr(row, kind)) for row in plan.layers] for kind in ("heads", "neurons")}
    assert sum(widths["neurons"]) < count * counts_of(model)[0]["neurons"], "width goes too"
    if options.get("uniform"):
        assert all(len(set(values)) == 1 for values in widths.values())
        assert hidden_size(student) < HIDDEN or "hidden" not in units

    def apart(layers: int) -> float:
        """How far the share of layers is from the share that these layers would keep of everything else."""

        def cost(part: float) -> float:
            heads = part if "heads" in units else 1.0
            row = counts(heads * size["heads"], part * size["neurons"], size["queries"] // size["heads"])
            return costs.of([row] * layers, round(part * HIDDEN) if "hidden" in units else HIDDEN)

        costs, size = unit_costs(model), counts_of(model)[0]
        parts = [k / 1000 for k in range(1001) if cost(k / 1000) <= keep * layer_params(model)]
        return abs(layers / total - max(parts, default=9.0))

    if options:  # a layer's share of all is its own
        assert apart(count) == pytest.approx(min(map(apart, range(1, total + 1))), abs=2e-3)


@pytest.mark.parametrize(
    "other", [{"hidden_size": 64, "head_dim": 4}, {"num_attention_heads": 16, "head_dim": 4}], ids=str
)
def test_scores_of_a_model_of_another_width_or_with_other_queries_are_refused(other):
    """As many layers, groups and neurons."""
    model, wider = family_model("llama", head_dim=4), family_model("llama", **other)
    scores = score(collect_statistics(wider, [family_batch(wider)], "kl"))
    assert [len(row) for row in scores.heads + scores.neurons] == [
        each[kind] for kind in ("heads", "neurons") for each in counts_of(model)
    ]
    with pytest.raises(
        InputError, match="scores: got '5 layers, .*; accepted: scores of this model, 5 layers, "
    ) as caught:
        plan_pruning(model, scores, 0.7)
    assert "\n" not in str(caught.value)


def test_depth_and_width_that_no_layer_fits_is_refused(deep):
    model, statistics = deep
    scores = score(statistics, "activation", layer_criterion="block_influence")
    with pytest.raises(InputError, match="keep: got 0.001; accepted: at least"):
        plan_pruning(model, scores, 0.001, units=("layers", "heads"), uniform=True)


# DeBERTa-v2 as released: a convolution follows the first layer, which stays.


@pytest.fixture(scope="module")
def convolved():
    """A DeBERTa-v2 with its convolution, and scores by which its first layer would go first."""
    model = family_model("deberta-v2-convolution")
    scores = score(collect_statistics(model, [family_batch(model)], "kl"), layer_criterion="block_influence")
    return model, replace(scores, layers=scores.layers - 10 * (torch.arange(5) == 0))


@pytest.mark.parametrize(
    ("keep", "units", "options"),
    [
        (0.6, ("layers",), {}),
        (0.2, ("layers",), {}),
        (0.5, ("layers", "heads", "neurons"), {"uniform": True}),
        (0.5, ("layers", "neurons"), {}),
        (0.15, ("layers", "neurons"), {"scope": "local"}),
    ],
    ids=str,
)
def test_the_first_layer_stays_where_a_convolution_follows_it(convolved, keep, units, options):
    model, scores = convolved
    plan = plan_pruning(model, scores, keep, units=units, **options)
    assert plan.layers[0].source == 0 and len(plan.layers) < 5
    assert plan.kept == pytest.approx(layer_params(prune(model, plan)) / layer_params(model)) and plan.kept <= keep


def test_what_a_convolution_ties_is_refused_in_one_line(convolved, monkeypatch):
    model, scores = convolved
    follows = "a convolution follows the first layer of this model$"
    with pytest.raises(InputError, match=f"^units: got .*; leave hidden out: {follows}"):
        plan_pruning(model, scores, 0.5, units=("neurons", "hidden"))
    monkeypatch.setattr(latency, "latency_costs", None)  # nothing is timed before the refusal
    with pytest.raises(InputError, match=f"^units: got .*; leave hidden out: {follows}"):
        plan_pruning(model, scores, 0.5, units=("neurons", "hidden"), cost="latency")
    every = full_plan(model)
    for plan, line in (
        (replace(every, layers=every.layers[1:]), r"plan.layers: got \[1, 2, 3, 4\]; keep layer 0"),
        (replace(every, hidden=(0, 1)), r"plan.hidden: got \(0, 1\); leave hidden out"),
    ):
        with pytest.raises(InputError, match=f"^{line}: {follows}"):
            prune(model, plan)
    rows = [LayerPlan(i, (), ()) for i in range(5)]
    least = layer_params(prune(model, PruningPlan("deberta-v2", tuple(rows[:1])))) / layer_params(model)
    units = ("layers", "neurons", "heads")
    assert [row.source for row in plan_pruning(model, scores, least * 1.01, units=units).layers] == [0]
    with pytest.raises(InputError, match="keep: got .*; accepted: at least 0.0"):
        plan_pruning(model, scores, least * 0.9, units=units)


def test_no_ffn_takes_over_across_the_convolution(convolved):
    model, _ = convolved
    found = fit_bypasses(model, keep_layers(model, [0, 2, 4]), [family_batch(model)])
    assert set(found.norms) == {2}, "layer 3; not layer 1, which reads what the convolution gives"


def test_single_layers_of_a_convolved_model_have_a_latency(convolved):
    model, _ = convolved
    clock = lambda first, second: (first() is None, 1.0 + (second() is None))  # noqa: E731
    for index in (0, 3):
        size = counts_of(model)[index]
        assert layer_run(model, index, size, HIDDEN, 2, 8)()[0].shape[-1] == HIDDEN
    assert {row[0] for row in layer_times(model, 2, 8, clock)} == {HIDDEN}


@pytest.fixture(scope="module")
def deep():
    """A decoder of eight layers."""
    model = family_model("llama", num_hidden_layers=8)
    return model, collect_statistics(model, [family_batch(model)], "kl")
