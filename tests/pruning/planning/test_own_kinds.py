"""Kinds of units of a user's own: what they remove goes, whichever way they say it, and what they cost is what goes with them."""

import pytest
import torch
from builders.families import family_model
from builders.pruning import random_scores

from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.planning.candidate import Choice
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.planning.rules import PlanningRules
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.kind import UnitKind
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.pruning.units.sizes import counts_of


def weights(model):
    return sum(p.numel() for p in model.model.layers.parameters())


class Half(UnitKind):
    """The weaker half of a layer's neurons, at once."""

    name = "half"
    scored = cuts = "neurons"
    block = True

    def candidates(self, choice):
        return [(i, 0, row.sort().values[:32].sum().item()) for i, row in enumerate(choice.scores.neurons)]

    def price(self, choice, i):
        return 32 * choice.price("neurons", i)

    def remove(self, choice, i, j):
        return choice.drop("neurons", i, self.weaker(choice.scores.neurons[i]))

    def weaker(self, scores):
        return scores.argsort()[:32]


class HalfByMask(Half):
    def weaker(self, scores):
        return scores < scores.sort().values[32]


class Groups(UnitKind):
    """A head, without all that the package's own kind does."""

    name = "groups"
    scored = cuts = "heads"
    block = True

    def candidates(self, choice):
        return [(i, j, value) for i, row in enumerate(choice.scores.heads) for j, value in enumerate(row.tolist())]

    def price(self, choice, i):
        return choice.price("heads", i)

    def remove(self, choice, i, j):
        return choice.drop("heads", i, torch.tensor([j]))


@pytest.mark.parametrize("kind", [Half, HalfByMask])
def test_units_go_that_are_named_by_indices_or_by_a_mask(kind, monkeypatch):
    model = family_model("llama")
    scores = random_scores(counts_of(model))
    monkeypatch.setitem(KINDS, "half", kind())
    plan = plan_pruning(model, scores, 0.75, units=("half",))
    halved = [i for i, row in enumerate(plan.layers) if len(row.neurons) < 64]
    assert halved
    for i in halved:
        assert set(plan.layers[i].neurons) == set(scores.neurons[i].argsort(descending=True)[:32].tolist())
    assert plan.kept == pytest.approx(weights(prune(model, plan)) / weights(model), abs=0.01)  # norms cost too


def test_a_kind_that_asks_for_the_price_of_a_head_meets_budgets_as_heads_do(monkeypatch):
    model = family_model("llama")
    scores = random_scores(counts_of(model))
    monkeypatch.setitem(KINDS, "groups", Groups())
    for keep in (0.9, 0.8):
        found, expected = (plan_pruning(model, scores, keep, units=(unit,)) for unit in ("groups", "heads"))
        assert found.kept == expected.kept and abs(found.kept - keep) < 0.05


@pytest.mark.parametrize("cost", ["params", "memory"])
@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_the_price_of_a_unit_is_what_the_model_costs_less_without_it(kind, cost):
    model = family_model("llama")
    shapes = counts_of(model)
    choice = Choice(random_scores(shapes), shapes, unit_costs(model, cost), 1.0, PlanningRules())
    choice.keep("queries", 1, 1)  # one of two
    choice.narrow(20)
    for i in (0, 1):
        before, price = choice.cost(), choice.price(kind, i)
        assert choice.drop(kind, i, slice(2, 3)) and not choice.drop(kind, i, torch.tensor([2]))
        assert before - choice.cost() == pytest.approx(price)
