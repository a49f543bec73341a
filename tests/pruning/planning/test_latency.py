"""Budgets in latency, with clocks that follow a known law: costs come back exactly, the loop meets its share or says why not."""

import json

import numpy as np
import pytest
import torch
from builders.families import family_model
from builders.models import tiny_model
from builders.pruning import counts, layer_params, random_scores

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.measuring.profiling import compare
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan
from distill_llm.pruning.planning import latency
from distill_llm.pruning.planning import layer_times as timing
from distill_llm.pruning.planning.latency import LatencySettings, plan_for_latency
from distill_llm.pruning.planning.latency_costs import costs_for, fit_costs, latency_costs
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.planning.rules import Limits, PlanningRules
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of

BATCH = {"batch_size": 2, "sequence_length": 8}


def law(hidden: int, queries: int, groups: int, neurons: int) -> float:
    """Milliseconds of a layer: every kind of unit has a part that grows with the width and one that does not."""
    return queries * (0.002 * hidden + 0.03) + groups * (0.001 * hidden + 0.01) + neurons * 0.0005 * hidden + 0.5


class FakeClock:
    """Times by the law; counts how often it was asked, and runs what it is given once."""

    def __init__(self):
        self.asked = 0

    def __call__(self, first, second):
        self.asked += 1
        for run in (first, second):
            assert run()[0].shape[-1] == run.hidden
        whole, other = (
            law(run.hidden, *map(run.counts.get, ("queries", "heads", "neurons"))) for run in (first, second)
        )
        return whole / 1e3, other / whole


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family", ["bert", pytest.param("llama", marks=SLOW), pytest.param("gpt2", marks=SLOW), "falcon-multi-query"]
)
def test_costs_of_units_come_back_from_times_that_follow_a_straight_line(tmp_path, family):
    model = family_model(family)
    costs = latency_costs(model, **BATCH, clock=FakeClock(), cache_dir=tmp_path)
    size = counts_of(model)[0]
    for hidden in (32, 16, 20):
        shared = size["queries"] // size["heads"]
        for groups, neurons, each in ((size["heads"], size["neurons"], shared), (size["heads"] // 2, 7, 1)):
            assert costs.of([counts(groups, neurons, each)], hidden) == pytest.approx(
                law(hidden, groups * each, groups, neurons)
            )
    assert costs.name == "latency" and costs.hidden == 32


def has(heads: int, queries: int, neurons: int) -> dict[str, int]:
    return {"heads": heads, "queries": queries, "neurons": neurons}


def noisy_rows(units: dict[int, tuple[float, float, float]]) -> list[list[float]]:
    """Times of single layers that are exactly so many milliseconds a head, a neuron and a layer at each width."""
    sizes = [(4, 64), (2, 64), (0, 64), (4, 32), (4, 0)]
    return [
        [width, heads, heads, neurons, head * heads + neuron * neurons + rest]
        for width, (head, neuron, rest) in units.items()
        for heads, neurons in sizes
    ]


def test_noise_makes_no_unit_dearer_in_a_narrower_stream_and_none_cost_less_than_nothing():
    """At half the width a neuron took longer and a head took less than half: no slope may be below 0 or above the
    line through the origin."""
    rows = noisy_rows({32: (0.4, 0.02, 0.5), 16: (0.1, 0.03, 0.5)})
    costs = fit_costs(rows, has(4, 4, 64), 32)
    for width in (32, 16, 8, 1):
        by_hand = 4 * (0.4 * width / 32) + 64 * 0.02 + 0.5
        assert costs.of([has(4, 4, 64)], width) == pytest.approx(by_hand), width
        assert costs.of([has(0, 0, 64)], width) == pytest.approx(64 * 0.02 + 0.5), (
            "a neuron costs what it does when wide"
        )


@pytest.mark.parametrize("seed", range(8))
def test_costs_of_noisy_times_fall_with_the_width_and_never_below_zero(seed):
    generator = np.random.default_rng(seed)
    sizes = [(8, 4, 64), (4, 2, 64), (0, 0, 64), (4, 4, 64), (8, 4, 32), (8, 4, 0)]
    rows = [[hidden, *each, law(hidden, *each) * generator.uniform(0.3, 1.7)] for hidden in (32, 16) for each in sizes]
    costs, shape = (
        fit_costs(rows, has(4, 8, 64), 32),
        [has(4, 8, 64)],
    )
    by_width = [costs.of(shape, width) for width in range(1, 33)]
    assert by_width == sorted(by_width)
    parts = [
        costs.at("heads", 1, 0),
        costs.at("queries", 1, 0),
        costs.at("neurons", 1),
        costs.of([has(0, 0, 0)], 1),
    ]
    assert min(parts) >= 0 and by_width[0] > 0


@pytest.fixture
def few_sizes(monkeypatch):
    monkeypatch.setattr(timing, "SHARES", (1.0,))


@pytest.mark.parametrize(
    ("keep", "options", "field"),
    [(0.0, {}, "keep"), (0.5, {"units": ("tails",)}, "units"), (0.5, {"round_to": 0}, "round_to")],
)
def test_bad_rules_are_refused_before_anything_is_timed(monkeypatch, keep, options, field):
    def timed(*args):
        raise AssertionError("the model was timed")

    monkeypatch.setattr(latency, "latency_costs", timed)
    model = tiny_model()
    with pytest.raises(InputError, match=f"^{field}: got"):
        plan_for_latency(model, random_scores(counts_of(model)), keep, rules=PlanningRules(**options))


def test_times_are_taken_once_for_a_device_layer_and_batch(tmp_path, few_sizes):
    model, clock = tiny_model(), FakeClock()
    first = latency_costs(model, **BATCH, clock=clock, cache_dir=tmp_path)
    asked = clock.asked
    assert latency_costs(tiny_model(layers=5, seed=1), **BATCH, clock=clock, cache_dir=tmp_path) == first
    assert clock.asked == asked > 0
    latency_costs(model, 3, 8, clock=clock, cache_dir=tmp_path)
    latency_costs(model.to(torch.bfloat16), **BATCH, clock=clock, cache_dir=tmp_path)
    latency_costs(tiny_model(intermediate=48), **BATCH, clock=clock, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4 and clock.asked > 3 * asked


def test_a_file_of_times_that_is_not_whole_is_taken_again(tmp_path, few_sizes):
    model, clock = tiny_model(), FakeClock()
    costs = latency_costs(model, **BATCH, clock=clock, cache_dir=tmp_path)
    (file,) = tmp_path.iterdir()
    record, asked = json.loads(file.read_text()), clock.asked
    assert record["key"]["batch"] == [2, 8] and len(record["rows"][0]) == len(record["columns"])
    for broken in ("{", "{}", json.dumps({**record, "key": {}})):
        file.write_text(broken)
        assert latency_costs(model, **BATCH, clock=clock, cache_dir=tmp_path) == costs
    assert clock.asked == 4 * asked
    (tmp_path / "a file").write_text("")
    latency_costs(model, **BATCH, clock=clock, cache_dir=tmp_path / "a file" / "below")


def test_times_are_kept_in_the_users_cache_folder(tmp_path, monkeypatch, few_sizes):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    latency_costs(tiny_model(), **BATCH, clock=FakeClock())
    assert len(list((tmp_path / "distill_llm" / "latency").glob("*.json"))) == 1


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=4, intermediate=128)


class Stopwatch:
    """A whole model's latency by its layers' parameters: a part that no plan removes, and a bend that costs do not know."""

    def __init__(self, outside: float = 0.2, power: float = 1.4, step: float = 0.0):
        self.outside, self.power, self.step, self.seen = outside, power, step, []

    def seconds(self, model) -> float:
        share = layer_params(model) / 100_000
        if self.step:
            share = -(-share // self.step) * self.step
        return self.outside + share**self.power

    def __call__(self, model, dense) -> float:
        self.seen.append(self.seconds(model) / self.seconds(dense))
        return self.seen[-1]


def planned(model, keep, watch, **options):
    scores = options.pop("scores", None) or random_scores(counts_of(model))
    settings = LatencySettings(costs=unit_costs(model), measure=watch, dense=options.pop("dense", None))
    return plan_for_latency(model, scores, keep, settings, PlanningRules(**options))


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5, 0.35])
@pytest.mark.parametrize("power", [0.6, 1.0, 2.0])
def test_the_budget_is_corrected_until_the_measured_share_is_met(model, keep, power):
    watch = Stopwatch(outside=0.1, power=power)
    plan = planned(model, keep, watch)
    assert plan.kept == pytest.approx(keep, rel=0.03) and plan.note is None
    assert plan.kept == watch(prune(model, plan), model), "what is reported was measured on this very plan"
    assert len(watch.seen) <= 7


def test_what_is_kept_is_a_share_of_the_whole_models_latency_not_of_its_layers(model):
    plan = planned(model, 0.6, Stopwatch(outside=0.3, power=1.0))
    layers = layer_params(model) / 100_000
    assert layer_params(prune(model, plan)) / 100_000 == pytest.approx(0.6 * (0.3 + layers) - 0.3, rel=0.05)


def test_a_later_round_is_held_against_the_dense_model(model):
    watch = Stopwatch(power=1.0)
    student = prune(model, plan_pruning(model, random_scores(counts_of(model)), 0.7))
    plan = planned(student, 0.5, watch, dense=model)
    assert watch.seconds(prune(student, plan)) / watch.seconds(model) == pytest.approx(0.5, rel=0.03)
    faster = planned(student, 0.9, watch, dense=model)
    assert faster.layers == full_plan(student).layers and "faster already" in faster.note


def test_whole_layers_come_in_steps_and_the_plan_says_so(model):
    plan = planned(model, 0.6, Stopwatch(outside=0.0, power=1.0), units=("layers",))
    assert len(plan.layers) in (2, 3)
    assert plan.note == f"kept {plan.kept:.4f} of the latency instead of 0.6: these units come in larger steps"
    met = planned(model, 0.5, Stopwatch(outside=0.0, power=1.0), units=("layers",))
    assert len(met.layers) == 2 and met.note is None


def test_a_clock_with_steps_ends_with_the_nearest_plan_and_a_reason(model):
    watch = Stopwatch(outside=0.0, power=1.0, step=0.1)
    plan = planned(model, 0.53, watch)
    assert plan.note and "instead of 0.53" in plan.note
    assert abs(plan.kept - 0.53) == min(abs(seen - 0.53) for seen in watch.seen)
    assert len(watch.seen) <= 11


@pytest.mark.parametrize("options", [{"units": ("heads",)}, {}], ids=str)
def test_a_share_that_these_units_cannot_reach_is_refused(model, options):
    with pytest.raises(InputError, match=r"keep: got 0.1; accepted: at least 0\.\d+ of the latency"):
        planned(model, 0.1, Stopwatch(outside=0.3), **options)


def test_faults_of_the_plan_are_not_taken_for_a_budget_too_small(model):
    with pytest.raises(InputError, match="round_to: got 0"):
        planned(model, 0.5, Stopwatch(), round_to=0)
    with pytest.raises(InputError, match="keep: got 0; accepted: a share above 0"):
        planned(model, 0, Stopwatch())


def test_costs_of_a_dense_model_hold_for_a_narrower_student_with_fewer_queries():
    model = family_model("llama")
    rows = tuple(LayerPlan(i, (0, 1, 2, 3), tuple(range(64)), (0, 2, 4, 6)) for i in range(5))
    student = prune(model, PruningPlan("llama", rows, hidden=tuple(range(24))))
    dense, own = unit_costs(model), costs_for(student, unit_costs(model))
    assert own.hidden == 24
    assert own.of([counts(4, 64)]) == pytest.approx(dense.of([counts(4, 64)], 24))


def test_a_plan_of_cost_latency_is_the_one_that_plan_for_latency_makes_of_what_it_measures(model, monkeypatch):
    watch, asked = Stopwatch(), []

    def costs(dense, *batch):
        asked.append(batch)
        return unit_costs(dense)

    def relative(pruned, dense, *batch):
        asked.append(batch)
        return watch(pruned, dense)

    monkeypatch.setattr(latency, "latency_costs", costs)
    monkeypatch.setattr(latency, "relative_latency", relative)
    scores, options = random_scores(counts_of(model)), {"round_to": 4, "limits": Limits(heads=1)}
    plan = plan_pruning(model, scores, 0.6, cost="latency", **BATCH, **options)
    assert plan == planned(model, 0.6, watch, scores=scores, **options)
    assert plan.kept == pytest.approx(0.6, rel=0.03)
    assert set(asked) == {(2, 8)} and len(asked) > 1


def test_an_unknown_cost_of_a_plan_is_refused_with_all_that_there_are(model):
    with pytest.raises(InputError, match="cost: got 'time'; accepted: one of params, flops, memory, latency"):
        plan_pruning(model, random_scores(counts_of(model)), 0.6, cost="time")


def test_what_plans_are_made_and_shown_with_is_public():
    for name in ("plan_for_latency", "latency_costs", "leave_one_out", "Limits", "plan_table", "plan_figure"):
        assert name in distill_llm.__all__ and callable(getattr(distill_llm, name))


@pytest.mark.slow
def test_on_this_device_the_pruned_model_takes_about_the_share_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny_model(layers=6, hidden=256, heads=8, intermediate=1024)
    batch = {"batch_size": 8, "sequence_length": 64}
    plan = plan_for_latency(model, random_scores(counts_of(model)), 0.6, LatencySettings(**batch))
    assert plan.note is None or "instead of 0.6" in plan.note
    speedup = compare(prune(model, plan), model, **batch).speedup
    assert 1 / speedup == pytest.approx(plan.kept, rel=0.25)
