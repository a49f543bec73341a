"""The removal of a round: several cuts, and budgets of every kind."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from builders.families import family_batch, family_model
from builders.grids import slow
from builders.models import random_batch, tiny_model
from builders.recipes import recipe_for
from builders.rounds import Counted, cutter, same
from datasets import Dataset

from distill_llm.architectures.families import FAMILIES
from distill_llm.common.errors import InputError
from distill_llm.pipeline import rounds as cutting
from distill_llm.pipeline.rounds import Cutter
from distill_llm.pipeline.stages.prune import calibration
from distill_llm.pruning.compensation.bypass import fit_bypasses
from distill_llm.pruning.compensation.in_order import DEFAULT_IN_ORDER
from distill_llm.pruning.cutting.in_order import prune_in_order
from distill_llm.pruning.cutting.strength import choose_strength
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import score
from distill_llm.pruning.learning.scales import scale_units
from distill_llm.pruning.learning.scaling import Scaling
from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers
from distill_llm.pruning.planning.budgets import least_share, share_of
from distill_llm.pruning.planning.latency_costs import fit_costs
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.planning.small_cuts import cut_shares
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of
from distill_llm.recipe.recipe import budget_batch, parse_recipe


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=4)


def test_one_cut_is_statistics_plan_and_prune(model, tmp_path):
    batches = Counted(model)
    found = cutter(tmp_path, batches).cut(model, model, 0.5)
    statistics = collect_statistics(model, batches.batches)
    plan = plan_pruning(model, score(statistics), 0.5)
    assert (found.plan.layers, found.plan.hidden) == (plan.layers, None)
    assert same(found.model, prune(model, plan, statistics))
    assert found.kept == found.plan.kept == pytest.approx(plan.kept)


@pytest.mark.parametrize("compensate", [False, True])
def test_cuts_measure_importance_anew_and_their_plan_is_one(model, tmp_path, compensate):
    batches = Counted(model)
    found = cutter(tmp_path, batches, cuts=2, compensate=compensate).cut(model, model, 0.5)
    by_hand = model
    for share in (0.5**0.5, 0.5):
        statistics = collect_statistics(by_hand, batches.batches)
        plan = plan_pruning(by_hand, score(statistics), share / share_of(by_hand, model, "params"))
        by_hand = prune(by_hand, plan, statistics if compensate else None)
    assert same(found.model, by_hand)
    whole = prune(model, found.plan)
    assert [p.shape for p in whole.parameters()] == [p.shape for p in by_hand.parameters()]
    assert same(whole, by_hand) != compensate
    assert found.kept == share_of(by_hand, model, "params") == pytest.approx(0.5, rel=0.01)


def test_every_cut_has_rows_of_its_own(model, tmp_path):
    rows = [Counted(model), [random_batch(model, seed=seed) for seed in (7, 8)]]
    recipe = parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, "cuts": 2}))
    found, by_hand = Cutter(recipe, rows.__getitem__).cut(model, model, 0.5), model
    for share, batches in zip((0.5**0.5, 0.5), rows, strict=True):
        statistics = collect_statistics(by_hand, batches)
        plan = plan_pruning(by_hand, score(statistics), share / share_of(by_hand, model, "params"))
        by_hand = prune(by_hand, plan, statistics)
    assert same(found.model, by_hand)


def test_what_compensates_a_cut_is_fitted_to_its_own_rows(tmp_path):
    decoder = family_model("llama")
    rows = [[family_batch(decoder, seed=seed)] for seed in (1, 2)]
    pruning = {"units": ["layers", "neurons"], "keep": 0.4, "cuts": 2, "moment_layers": 2}
    found = Cutter(parse_recipe(recipe_for(tmp_path, pruning=pruning)), rows.__getitem__).cut(decoder, decoder, 0.4)
    by_hand = decoder
    for share, batches in zip(cut_shares(1.0, 0.4, 2), rows, strict=True):
        statistics = collect_statistics(by_hand, batches, loss="kl")
        left = share / share_of(by_hand, decoder, "params")
        plan = plan_pruning(by_hand, score(statistics), left, units=["layers", "neurons"])
        by_hand = prune(by_hand, plan, statistics, bypasses=fit_bypasses(by_hand, plan, batches))
    for one, other in zip(found.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pruning",
    [
        {"units": ["layers", "neurons", "hidden"], "cuts": 2},
        {"units": ["heads", "neurons"], "moment_layers": 2},
        {"units": ["heads", "neurons"], "compensate": "in_order"},
        *slow(
            {"units": ["layers"], "criterion": "leave_one_out", "loss": "kl"},
            {
                "units": ["layers", "neurons"],
                "criterion": "activation",
                "layer_criterion": "block_influence",
                "uniform": True,
            },
        ),
    ],
    ids=str,
)
def test_models_that_are_offloaded_are_cut_alike(tmp_path, pruning):
    decoder = family_model("llama", num_hidden_layers=6)
    batches = [family_batch(decoder, seed=seed) for seed in (1, 2)]
    recipe = parse_recipe(
        recipe_for(tmp_path, pruning={"keep": 0.6, "offload": True, "checkpointing": True, **pruning})
    )
    here, there = (
        Cutter(recipe, lambda cut: batches, device).cut(decoder, decoder, 0.6)
        for device in (None, torch.device("cpu:0"))
    )
    assert there.plan == here.plan
    for one, other in zip(there.model.parameters(), here.model.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "count",
    [pytest.param(3, id="no row to spare"), pytest.param(10, id="rows held out", marks=pytest.mark.slow)],
)
def test_every_cut_is_fitted_in_order_to_its_own_rows(tmp_path, count):
    decoder = family_model("llama")
    rows = [[family_batch(decoder, seed=20 * cut + seed) for seed in range(count)] for cut in range(2)]
    pruning = {"keep": 0.5, "cuts": 2, "compensate": "in_order", "moment_share": 1}
    found = Cutter(parse_recipe(recipe_for(tmp_path, pruning=pruning)), rows.__getitem__).cut(decoder, decoder, 0.5)
    by_hand, strengths = decoder, []
    for share, batches in zip(cut_shares(1.0, 0.5, 2), rows, strict=True):
        fitted = [batch for i, batch in enumerate(batches) if i % 5 != 4]
        settings = CalibrationSettings(moment_share=1.0)
        statistics = collect_statistics(by_hand, fitted, "kl", settings=settings)
        plan = plan_pruning(by_hand, score(statistics), share / share_of(by_hand, decoder, "params"))
        how = DEFAULT_IN_ORDER
        if count > 4:
            strengths.append(choose_strength(by_hand, plan, statistics, batches[4::5], in_order=fitted))
            assert strengths[-1].in_order is not None
            how = strengths[-1].in_order
        by_hand = prune_in_order(by_hand, plan, fitted, how)
    assert found.compensated and [each.in_order for each in found.strengths] == [each.in_order for each in strengths]
    for one, other in zip(found.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_scales_are_learnt_after_the_last_cut_from_the_model_before_the_first(tmp_path):
    decoder = family_model("llama")
    batches = [family_batch(decoder, seed=seed) for seed in range(5)]
    pruning = {"cuts": 2, "scales": {"steps": 6, "learning_rate": 0.05}}
    plain = cutter(tmp_path, batches, cuts=2).cut(decoder, decoder, 0.5)
    found = cutter(tmp_path, batches, **pruning).cut(decoder, decoder, 0.5)
    done = scale_units(plain.model, decoder, batches[:4], batches[4:], Scaling(6, 0.05))
    assert plain.scaled is None and found.compensated
    assert found.scaled.record() == pytest.approx(done.record(), rel=1e-3)
    assert done.folded and same(found.model, plain.model)


def test_a_cut_that_leaves_no_units_has_no_scales(tmp_path, monkeypatch):
    decoder = family_model("llama")
    bare = PruningPlan(decoder.config.model_type, (LayerPlan(0, (), ()),), kept=0.01)
    monkeypatch.setattr(Cutter, "plan", lambda *_: bare)
    batches = [family_batch(decoder, seed=seed) for seed in range(2)]
    found = cutter(tmp_path, batches, scales={}, compensate=False).cut(decoder, decoder, 0.5)
    assert counts_of(found.model)[0]["neurons"] == 0 and found.scaled is None and not found.compensated


@pytest.mark.parametrize("named", [None, [0, 1, 4]])
def test_a_model_that_cannot_be_fitted_in_order_is_refused_before_the_statistics(tmp_path, monkeypatch, named):
    monkeypatch.setitem(FAMILIES, "gemma2", replace(FAMILIES["gemma2"], normed_after=False))
    model = family_model("gemma2")
    keep = None if named else 0.5
    cuts = cutter(tmp_path, [family_batch(model)], keep=keep, layers=named, compensate="in_order")
    monkeypatch.setattr(cuts.calibration, "statistics", None)
    with pytest.raises(InputError, match="^pruning.compensate: got 'in_order'; set it to true: layer 0 of gemma2"):
        cuts.cut_layers(model) if named else cuts.cut(model, model, 0.5)


def test_layers_that_the_recipe_names_are_fitted_in_order(tmp_path):
    decoder = family_model("llama")
    batches = [family_batch(decoder, seed=seed) for seed in range(3)]
    found = cutter(tmp_path, batches, keep=None, layers=[0, 1, 4], compensate="in_order").cut_layers(decoder)
    assert found.compensated and not found.strengths
    assert same(found.model, prune_in_order(decoder, keep_layers(decoder, [0, 1, 4]), batches))


@pytest.mark.parametrize("units, compensated", [(["layers"], False), (["layers", "neurons"], True)])
def test_a_cut_says_whether_anything_took_over(tmp_path, units, compensated):
    model = family_model("gemma2")  # which has no bypass
    found = cutter(tmp_path, [family_batch(model)], units=units).cut(model, model, 0.6)
    assert found.compensated == compensated


@pytest.mark.parametrize("cuts", [1, 2])
def test_ffns_take_over_what_the_layers_of_every_cut_added(tmp_path, cuts):
    decoder = family_model("llama")
    batches = [family_batch(decoder, seed=seed) for seed in range(4)]
    options = {"units": ["layers"], "criterion": "block_influence", "keep": 0.6, "cuts": cuts}
    found, by_hand = cutter(tmp_path, batches, **options).cut(decoder, decoder, 0.6), decoder
    for share in cut_shares(1.0, 0.6, cuts):
        statistics = collect_statistics(by_hand, batches, loss=None)
        left = share / share_of(by_hand, decoder, "params")
        plan = plan_pruning(by_hand, score(statistics, "block_influence"), left, units=["layers"])
        by_hand = prune(by_hand, plan, bypasses=fit_bypasses(by_hand, plan, batches))
    assert found.compensated and same(found.model, by_hand)
    assert not same(by_hand, prune(decoder, found.plan))


@pytest.mark.parametrize(
    "family, compensate, compensated", [("llama", True, True), ("llama", False, False), ("gemma2", True, False)]
)
def test_layers_named_by_the_recipe_are_compensated_where_an_ffn_can_take_over(
    tmp_path, family, compensate, compensated
):
    model = family_model(family)
    batches = [family_batch(model, seed=seed) for seed in range(3)]
    options = {"keep": None, "layers": [0, 1, 4], "compensate": compensate}
    found, plan = cutter(tmp_path, batches, **options).cut_layers(model), keep_layers(model, [0, 1, 4])
    bypasses = fit_bypasses(model, plan, batches) if compensated else None
    assert (found.plan, found.kept, found.compensated) == (plan, pytest.approx(0.6), compensated)
    assert same(found.model, prune(model, plan, bypasses=bypasses))


def stages_with(lengths):
    """Rows of these lengths, each of its own number, as a run has them."""
    rows = Dataset.from_dict({"input_ids": [[i] for i in range(len(lengths))], "length": lengths})
    fields = {"data": SimpleNamespace(train=rows), "recipe": SimpleNamespace(seed=0), "collator": list}
    fields["opened"] = SimpleNamespace(calibration=None)
    return SimpleNamespace(**fields, tokenizer=SimpleNamespace(model_input_names=["input_ids"]))


@pytest.mark.parametrize("length, size", [(13, 32), (512, 4), (1500, 1), (5000, 1)])
def test_batches_of_long_rows_are_small(length, size):
    batches = list(calibration(stages_with([length] * 400), 256))
    assert [len(batch) for batch in batches] == [size] * (320 // size), "a quarter more than 256 is held out"


def test_cuts_read_other_training_rows_while_there_are_any():
    stages = stages_with([1] * 10)
    read = [{row["input_ids"][0] for batch in calibration(stages, 4, cut) for row in batch} for cut in range(4)]
    assert [len(each) for each in read] == [5] * 4, "four to measure, one to hold out"
    assert len(read[0] | read[1]) == 10 and read[2] == read[0]


def test_a_later_round_goes_on_from_what_the_student_has(model, tmp_path):
    first = cutter(tmp_path, Counted(model)).cut(model, model, 0.7)
    second = cutter(tmp_path, Counted(model), cuts=2).cut(first.model, model, 0.4)
    assert share_of(second.model, model, "params") == pytest.approx(0.4, rel=0.01)
    assert second.plan.kept == pytest.approx(0.4 / 0.7, rel=0.02)


def test_latency_is_held_against_the_teacher_in_every_cut(model, tmp_path, monkeypatch):
    """A clock that knows the layers' costs: what is kept of it is what was asked for."""
    costs = fit_costs([[32, 4, 4, 64, 3.0], [32, 0, 0, 64, 2.0], [32, 4, 4, 0, 1.5]], counts_of(model)[0], 32)

    def relative(pruned, dense, batch_size, sequence_length):
        assert (batch_size, sequence_length) == (2, 8), "those of evaluation.latency"
        spent = [2.0 + costs.of(counts_of(m)) for m in (pruned, dense)]
        return spent[0] / spent[1]

    monkeypatch.setattr(cutting, "latency_costs", lambda *args: costs)
    monkeypatch.setattr(cutting, "relative_latency", relative)
    monkeypatch.setattr("distill_llm.pruning.planning.latency.relative_latency", relative)
    for cuts in (1, 3):
        found = cutter(tmp_path, Counted(model), cost="latency", cuts=cuts).cut(model, model, 0.6)
        assert found.kept == relative(found.model, model, 2, 8) == pytest.approx(0.6, rel=0.03)
        later = cutter(tmp_path, Counted(model), cost="latency").cut(found.model, model, 0.4)
        assert later.kept == relative(later.model, model, 2, 8) == pytest.approx(0.4, rel=0.03)


def test_memory_counts_the_keys_and_values_of_a_decoders_batch_and_of_nothing_else(tmp_path):
    recipe = parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, "cost": "memory"}))
    assert (budget_batch(recipe, True), budget_batch(recipe, False)) == ((2, 8), (0, 8))
    other = parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, "cost": "flops"}))
    assert budget_batch(other, True) == budget_batch(other, False) == (2, 8)


def test_every_sequence_of_a_recipes_batch_has_a_window_of_its_own_in_memory(tmp_path):
    """Half of the groups gone; keys and values of 5 layers hold 6 sequences, 8 of 24 tokens of each, 4 channels of a group."""
    model, batch = family_model("mistral"), {"latency": {"batch_size": 6, "sequence_length": 24}}
    recipe = parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.8, "cost": "memory"}, evaluation=batch))
    rows = tuple(LayerPlan(i, (0, 1), tuple(range(64))) for i in range(5))
    student, cached = prune(model, PruningPlan("mistral", rows)), 2 * 5 * 6 * 8 * 4
    left, whole = (sum(p.numel() for p in m.model.layers.parameters()) for m in (student, model))
    found = Cutter(recipe, lambda cut: []).share(student, model)
    assert found == pytest.approx((left + 2 * cached) / (whole + 4 * cached))


def test_shares_of_memory_are_of_the_teachers_layers_that_the_students_were(tmp_path):
    """Of five layers every second has no window: 1000 tokens in place of 8, 4 groups, 8 channels of keys and of values."""
    model, windows = family_model("gemma2"), (8, 1000, 8, 1000, 8)
    student = prune(model, keep_layers(model, [1, 2, 3]))
    smaller = prune(student, keep_layers(student, [1, 2]))

    def memory(model, layers):
        weights = sum(p.numel() for p in model.model.layers.parameters())
        return weights + 2 * 2 * 4 * 8 * sum(windows[i] for i in layers)

    for one, its, other, others in (
        (student, (1, 2, 3), model, range(5)),
        (smaller, (2, 3), model, range(5)),
        (smaller, (2, 3), student, (1, 2, 3)),
    ):
        assert share_of(one, other, "memory", 2, 1000) == pytest.approx(memory(one, its) / memory(other, others))


def test_shares_count_channels_and_single_queries():
    model = family_model("llama")
    rows = tuple(LayerPlan(i, (0, 1, 2, 3), tuple(range(64)), (0, 2, 4, 6)) for i in range(5))
    student = prune(model, PruningPlan("llama", rows, hidden=tuple(range(24))))
    left, whole = (sum(p.numel() for p in m.model.layers.parameters()) for m in (student, model))
    assert share_of(student, model, "params") == pytest.approx(left / whole)


@pytest.mark.parametrize(
    "pruning",
    [
        {"units": ["heads"]},
        {"units": ["queries"]},
        {"units": ["attention", "neurons"]},
        {"units": ["layers", "heads"]},
        {"units": ["heads", "neurons"], "min_heads": 1, "min_neurons": 5},
        {"units": ["ffn"], "cost": "flops"},
        {"units": ["neurons"], "min_neurons": 5, "round_to": 4},
        {"units": ["heads"], "scope": "local"},
        {"units": ["heads", "neurons"], "uniform": True},
    ],
    ids=str,
)
def test_no_plan_leaves_less_than_the_least_share_and_one_leaves_that(tmp_path, pruning):
    model = family_model("llama")
    section = parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, **pruning})).pruning
    least = least_share(model, section.rules, section.cost, 2, 8)
    statistics = collect_statistics(model, [random_batch(model, labels=False)], "kl")
    work = cutter(tmp_path, [], **pruning)
    plan = work.plan(model, model, statistics, least * 1.0001)
    assert plan.kept == pytest.approx(least, rel=1e-3)
    with pytest.raises(ValueError, match="keep: got"):
        work.plan(model, model, statistics, least * 0.97)
    assert unit_costs(model).hidden == 32
