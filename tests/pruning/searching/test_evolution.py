"""Evolution over plans: the best of a landscape that brute force knows, within the budget, seeded, and continued after a stop."""

import itertools
import json
from dataclasses import replace
from random import Random

import pytest
import torch
from builders.families import family_batch, family_model
from builders.models import random_batch, tiny_model

from distill_llm import collect_statistics, masked, plan_pruning, prune, score
from distill_llm.common.errors import InputError
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.planning.competing import plan_for_costs
from distill_llm.pruning.planning.rules import Limits, PlanningRules
from distill_llm.pruning.searching.evolution import Known, SearchSettings, _child, evolve
from distill_llm.pruning.searching.fitness import Divergence, some_tokens
from distill_llm.pruning.searching.shares import Space
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of

UNITS = ("heads", "neurons")


def start(model, keep=0.5, units=UNITS, cost="params", **rules):
    """A space and the plain plan of a model, scored by magnitude."""
    scores, costs = score(collect_statistics(model, [], None), "magnitude"), unit_costs(model, cost)
    plain = plan_pruning(model, scores, keep, units=units, cost=cost, **rules)
    return Space(model, scores, costs, keep * costs.of(counts_of(model)), PlanningRules(units, **rules)), plain


def kept(plan):
    return {row.source: (len(row.heads), len(row.neurons)) for row in plan.layers}


@pytest.fixture(scope="module")
def small():
    """Two layers of two heads and eight neurons in steps of four: 81 plans."""
    return tiny_model(layers=2, hidden=16, heads=2, intermediate=8)


@pytest.fixture(scope="module")
def settled(small):
    return start(small, 0.6, round_to=4)


def test_the_best_plan_of_a_toy_landscape_is_found(small, settled):
    space, plain = settled
    wanted = ((0, 8), (2, 4))

    def height(plan):
        return sum(abs(a - b) for i, row in enumerate(wanted) for a, b in zip(kept(plan)[i], row, strict=True))

    every = itertools.product(itertools.product(range(3), (0, 4, 8)), repeat=2)
    least = min(height(space.plan(genome, 0.6)) for genome in every if space.fits(genome))
    found = evolve(space, plain, 0.6, height, SearchSettings(15, 8))
    assert found.best == height(found.plan) == least < found.plain == height(plain)
    assert [best for best, _ in found.history] == sorted((best for best, _ in found.history), reverse=True)
    assert len(found.history) == 16 and found.history[-1][0] == found.best


@pytest.mark.slow
def test_of_a_real_model_it_is_the_least_divergence_of_all_masked_models(small, settled):
    space, plain = settled
    batches = [random_batch(small, batch=8, labels=False)]
    fitness = Divergence(small, batches)
    found = evolve(space, plain, 0.6, fitness, SearchSettings(12, 8))
    with torch.no_grad():
        dense, losses = small(**batches[0]).logits.log_softmax(-1), {}
        for genome in itertools.product(itertools.product(range(3), (0, 4, 8)), repeat=2):
            if space.fits(genome):
                with masked(small, space.plan(genome, 0.6)):
                    out = small(**batches[0]).logits.log_softmax(-1)
                losses[genome] = ((dense - out) * dense.exp()).sum(-1).mean().item()
    best = min(losses, key=losses.get)
    assert kept(found.plan) == dict(enumerate(best)) and found.best == pytest.approx(losses[best], rel=1e-4)
    assert found.best <= found.plain


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, units, cost, rules",
    [
        ("bert", UNITS, "params", {"limits": Limits(1, 8), "round_to": 8}),
        ("bert", ("heads", "neurons", "layers"), "flops", {}),
        ("llama", ("neurons", "layers"), "memory", {"round_to": 4}),
        ("llama", ("heads",), "params", {}),
    ],
)
def test_every_candidate_is_within_the_budget_and_the_limits_and_near_to_it(family, units, cost, rules):
    model = tiny_model(layers=4) if family == "bert" else family_model(family)
    space, plain = start(model, 0.5 if "neurons" in units else 0.8, units, cost, **rules)
    random, seen = Random(1), [space.of_plan(plain)]
    total, counts = space.costs.of(counts_of(model)), counts_of(model)
    for _ in range(60):
        one, other = random.choices(seen, k=2)
        genome = (
            space.mutated(one, random, random.randint(1, 4))
            if random.random() < 0.5
            else space.crossed(one, other, random)
        )
        plan = space.plan(genome, 0.5)
        share = plan.share(model, cost)
        assert share * total <= space.budget * (1 + 1e-6) and space.fits(genome)
        assert plan.kept == pytest.approx(share)
        for row in plan.layers:
            heads, neurons = len(row.heads), len(row.neurons)
            if "limits" in rules:
                assert heads >= 1 and neurons >= 8
            assert neurons % rules.get("round_to", 1) == 0 or neurons == counts[row.source]["neurons"]
            assert "heads" in units or heads == counts[row.source]["heads"]
            assert "neurons" in units or neurons == counts[row.source]["neurons"]
        assert "layers" in units or len(plan.layers) == len(counts)
        if units != ("heads",):
            assert (
                share * total >= (0.75 if cost == "memory" else 0.9) * space.budget
            )  # a layer with its cache is large
        seen.append(genome)
    assert len(set(seen)) > (5 if cost == "memory" else 10)


def counting(limit=None):
    """A landscape, and the plans that were tried in it; after so many it stops."""
    tried = []

    def height(plan):
        if len(tried) == limit:
            raise KeyboardInterrupt
        tried.append(plan)
        return sum((heads * 7 + neurons * 3) % 11 for heads, neurons in kept(plan).values())

    return height, tried


def test_the_same_seed_gives_the_same_plan_and_a_stop_changes_nothing(tmp_path):
    space, plain = start(tiny_model(layers=4))
    settings, identity = SearchSettings(4, 6, seed=3), {"model": "x"}
    height, tried = counting()
    whole = evolve(space, plain, 0.5, height, settings)
    assert evolve(space, plain, 0.5, counting()[0], settings) == whole
    assert evolve(space, plain, 0.5, counting()[0], SearchSettings(4, 6, seed=4)).history != whole.history
    done = 0
    for limit in (3, 9, None):
        height, again = counting(limit)
        try:
            found = evolve(space, plain, 0.5, height, settings, Known(tmp_path / "search.json", identity))
        except KeyboardInterrupt:
            assert len(json.loads((tmp_path / "search.json").read_text())["fitness"]) == done + limit
        done += len(again)
    assert found == whole and done == len(tried) == whole.tried
    more = evolve(
        space, plain, 0.5, counting()[0], SearchSettings(6, 6, seed=3), Known(tmp_path / "search.json", identity)
    )
    assert more.history[:5] == whole.history and more.best <= whole.best


def test_what_was_found_of_another_model_is_not_used(tmp_path, settled):
    space, plain = settled
    file = tmp_path / "search.json"
    evolve(space, plain, 0.6, lambda plan: 1.0, SearchSettings(1, 2), Known(file, {"model": "x"}))
    assert Known(file, {"model": "x"}).fitness and not Known(file, {"model": "y"}).fitness
    file.write_text("{")
    assert not Known(file, {"model": "x"}).fitness


def test_layers_come_back_and_mixtures_have_layers_of_both():
    space = start(tiny_model(layers=4), units=(*UNITS, "layers"))[0]
    one, other = ((1, 9), (2, 60), None, (1, 30)), ((2, 8), None, (1, 50), (2, 20))
    changed = [space.mutated(one, Random(seed), 2) for seed in range(40)]
    assert any(genome[2] is not None for genome in changed) and any(genome[1] is None for genome in changed)
    mixed = [space.crossed(one, other, Random(seed)) for seed in range(40)]
    assert {genome[1] is None for genome in mixed} == {genome[2] is None for genome in mixed} == {True, False}
    assert all(space.fits(genome) for genome in changed + mixed)


def test_parents_are_the_better_of_two_that_are_drawn():
    class Same:
        """Children are their first parent."""

        def crossed(self, one, other, random):
            return one

        def mutated(self, genome, random, moves):
            return genome

    parents, random = [(2.0, ((1, 1),)), (1.0, ((2, 2),))], Random(0)
    better = sum(_child(Same(), parents, set(), random) == ((2, 2),) for _ in range(400))
    assert 0.68 < better / 400 < 0.82  # 3 of 4


def test_what_was_found_for_other_units_of_the_same_numbers_is_not_used(tmp_path, small, settled):
    space, plain = settled
    reverse = {kind: tuple(-row for row in getattr(space.scores, kind)) for kind in ("heads", "neurons")}
    scores = replace(space.scores, units={**space.scores.units, **reverse})
    other = Space(small, scores, space.costs, space.budget, space.rules)
    tried, settings = [], SearchSettings(2, 4)
    file = tmp_path / "search.json"
    for each in (space, space, other):
        start = each.plan(each.of_plan(plain), 0.6)
        tried.append([])
        evolve(each, start, 0.6, lambda plan: tried[-1].append(plan) or len(tried[-1]), settings, Known(file, {}))
    assert len(tried[0]) > 3 and tried[1] == [] and tried[2]
    assert {plan.layers for plan in tried[2]}.isdisjoint(plan.layers for plan in tried[0])


def test_of_equal_plans_the_plain_one_stays(settled):
    space, plain = settled
    assert evolve(space, plain, 0.6, lambda plan: 1.0, SearchSettings(3, 4)).plan is plain
    nothing = evolve(space, plain, 0.6, lambda plan: float("inf"), SearchSettings(2, 3))
    assert nothing.plan is plain
    assert nothing.record() == {"plain": None, "best": None, "history": [[None, None]] * 3, "tried": nothing.tried}


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_units_that_take_no_time_are_kept(kind):
    """As a fit to measured times may say of them."""
    model = tiny_model(layers=3)
    costs = unit_costs(model)
    free = {kind: (0.0, 0.0), **({"queries": (0.0, 0.0)} if kind == "heads" else {})}
    costs, rules = replace(costs, units={**costs.units, **free}), PlanningRules((*UNITS, "layers"))
    scores, budget = score(collect_statistics(model, [], None), "magnitude"), 0.6 * costs.of(counts_of(model))
    space, plain = Space(model, scores, costs, budget, rules), plan_for_costs(model, scores, 0.6, costs, rules)
    random, genome, whole = Random(0), space.of_plan(plain), counts_of(model)[0][kind]
    for _ in range(20):
        genome = space.mutated(genome, random, 2)
        assert space.fits(genome)
        assert all(row is None or row[UNITS.index(kind)] == whole for row in genome), genome


def test_of_layers_of_which_only_some_fit_one_that_does_stays():
    """The first layer is large, the others small: the budget has room for some of those alone."""
    model = tiny_model(layers=4)
    count = counts_of(model)[0]
    small = [LayerPlan(i, (0,), (0, 1)) for i in (1, 2, 3)]
    whole = LayerPlan(0, tuple(range(count["heads"])), tuple(range(count["neurons"])))
    uneven = prune(model, PruningPlan(model.config.model_type, (whole, *small)))
    scores, costs, rules = score(collect_statistics(uneven, [], None), "magnitude"), unit_costs(uneven), ("layers",)
    space = Space(uneven, scores, costs, 0.3 * costs.of(counts_of(uneven)), PlanningRules(rules))
    row = space.of_plan(plan_for_costs(uneven, scores, 1.0, costs, PlanningRules(rules)))
    seen = {space.repaired(row, Random(seed)) for seed in range(30)}
    seen |= {space.repaired((row[0], None, None, None), Random(seed)) for seed in range(10)}
    assert all(space.fits(genome) and genome[0] is None for genome in seen) and len(seen) > 1
    tight = Space(uneven, scores, costs, 1.0, PlanningRules(rules))
    with pytest.raises(InputError, match="budget: got 1.0; allow more"):
        tight.repaired(row, Random(0))


def test_it_is_never_worse_than_the_plain_plan_and_what_is_not_finite_is_worst(settled):
    space, plain = settled
    found = evolve(space, plain, 0.6, lambda plan: 1.0 if plan is plain else float("nan"), SearchSettings(2, 3))
    assert found.plan is plain and found.best == found.plain == 1.0


def test_what_cannot_be_searched_is_refused(small, settled):
    space, plain = settled
    for rules, said in (
        ({"units": ["hidden"]}, "units"),
        ({"uniform": True}, "uniform"),
        ({"scope": "local"}, "scope"),
    ):
        with pytest.raises(InputError, match=said):
            Space(small, space.scores, space.costs, space.budget, PlanningRules(**{"units": UNITS, **rules}))
    tight = Space(small, space.scores, space.costs, space.budget / 2, space.rules)
    with pytest.raises(InputError, match="within the budget"):
        evolve(tight, plain, 0.6, lambda plan: 1.0)
    for given in ({"generations": 0}, {"population": 1}):
        with pytest.raises(InputError, match=next(iter(given))):
            SearchSettings(**given)


def test_a_few_tokens_are_whole_rows_of_batches_spread_over_all():
    model = tiny_model(layers=1)
    batches = [random_batch(model, batch=4, length=10 + 2 * i) for i in range(4)]
    lengths = [batch["attention_mask"].sum(1) for batch in batches]
    total = int(torch.cat(lengths).sum())
    assert some_tokens(batches, total) == batches
    half = some_tokens(batches, total // 2 - 1)
    assert len(half) == 2
    for batch, whole, sizes in zip(half, batches[::2], lengths[::2], strict=True):
        rows = int((sizes.cumsum(0) <= (total // 2 - 1) / 2).sum())
        assert rows > 0 and torch.equal(batch["input_ids"], whole["input_ids"][:rows])
    assert [len(batch["input_ids"]) for batch in some_tokens(batches, 1)] == [1]


def test_divergence_is_that_of_the_masked_decoder():
    model = family_model("llama")
    plain = start(model)[1]
    batch = random_batch(model, batch=3, labels=False)
    with torch.no_grad():
        dense = model(**batch).logits.log_softmax(-1)
        with masked(model, plain):
            cut = model(**batch).logits.log_softmax(-1)
    kl = ((dense - cut) * dense.exp()).sum(-1)[:, :-1]
    mask = batch["attention_mask"][:, 1:]
    wanted = ((kl * mask).sum(1) / mask.sum(1)).mean().item()
    fitness = Divergence(model, [batch])
    assert fitness(plain) == pytest.approx(wanted, rel=1e-4) == fitness(plain)


def test_divergence_of_a_model_that_reads_images():
    """Its config has no vocabulary, and its batches no ids."""
    model = family_model("vit")
    plain = start(model)[1]
    batch = family_batch(model)
    with torch.no_grad():
        dense = model(**batch).logits.log_softmax(-1)
        with masked(model, plain):
            cut = model(**batch).logits.log_softmax(-1)
    wanted = ((dense - cut) * dense.exp()).sum(-1).mean().item()
    assert Divergence(model, [batch])(plain) == pytest.approx(wanted, rel=1e-4)
