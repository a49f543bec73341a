"""docs/development/add-a-unit.md: its kind is added and removed from a model; nothing else is edited for it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders.families import assert_equal, family_batch, family_model, outputs_of
from builders.models import random_batch, tiny_model
from builders.pruning import random_scores
from builders.recipes import recipe_for

from distill_llm import load_pretrained, masked, plan_pruning, prune
from distill_llm.common.errors import InputError
from distill_llm.pipeline.rounds import Cutter
from distill_llm.pruning.names import UNITS
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.pruning.units.sizes import counts_of
from distill_llm.recipe.recipe import parse_recipe

TEXT = (Path(__file__).parents[3] / "docs" / "development" / "add-a-unit.md").read_text()
KIND, USE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def tiles():
    """The page's kind is in the table."""
    exec(KIND, {})
    yield
    del KINDS["neuron_tiles"]


def test_recipes_name_the_packages_own_kinds_in_the_order_of_the_table():
    assert tuple(KINDS) == UNITS


def test_a_recipe_takes_the_kind_of_the_page_and_plans_with_it(tiles, tmp_path):
    pruning = {"keep": 0.7, "units": ["neuron_tiles"], "scope": "local", "compensate": False}
    with pytest.raises(
        InputError, match=r"pruning\.units\.0: got 'neuron_tile'; accepted: 'neuron_tiles' .the nearest."
    ):
        parse_recipe(recipe_for(tmp_path, pruning={**pruning, "units": ["neuron_tile"]}))
    recipe = parse_recipe(recipe_for(tmp_path, pruning={**pruning, "scope": "global", "min_neurons": 8}))
    assert recipe.pruning.rules.limits.neurons == 8
    model = tiny_model(layers=3)
    recipe = parse_recipe(recipe_for(tmp_path, pruning=pruning))
    plan = Cutter(recipe, lambda number: [random_batch(model)]).cut(model, model, 0.7).plan
    gone = [64 - len(row.neurons) for row in plan.layers]
    assert sum(gone) and all(count % 8 == 0 for count in gone)


def test_a_recipe_knows_the_kind_only_while_it_is_in_the_table(tmp_path):
    with pytest.raises(InputError, match=r"pruning\.units\.0: got 'neuron_tiles'; accepted: .*neurons, layers"):
        parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.7, "units": ["neuron_tiles"]}))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_the_kind_of_the_page_removes_tiles_of_the_least_sum(tiles, family, tmp_path):
    model = family_model(family)
    batch = family_batch(model)
    names = {"model": model, "batches": [batch]}
    exec(USE, names)
    plan, student = names["plan"], names["student"]
    assert 0.7 * 0.95 <= plan.kept <= 0.7 and {len(row.heads) for row in plan.layers} == {counts_of(model)[0]["heads"]}
    gone = [64 - len(row.neurons) for row in plan.layers]
    assert sum(gone) and all(count % 8 == 0 for count in gone)
    assert all({n // 8 * 8 + k for k in range(8)} <= set(row.neurons) for row in plan.layers for n in row.neurons)
    with masked(model, plan):
        expected = outputs_of(model, batch)
    assert_equal(outputs_of(prune(model, plan), batch), expected)
    student.save_pretrained(tmp_path)
    assert_equal(outputs_of(load_pretrained(tmp_path), batch), outputs_of(student, batch))


def test_tiles_go_by_the_sum_of_their_scores_over_all_layers(tiles):
    """By hand: sorted sums, and as many tiles as the budget lets stay."""
    model = family_model("llama")
    scores = random_scores(counts_of(model))
    sums = torch.cat([row.view(-1, 8).sum(1) for row in scores.neurons])
    plan = plan_pruning(model, scores, 0.7, units=("neuron_tiles",))
    kept = torch.cat(
        [torch.isin(torch.arange(64), torch.tensor(row.neurons)).view(-1, 8).all(1) for row in plan.layers]
    )
    count = int((~kept).sum())
    assert set(sums.argsort()[:count].tolist()) == set((~kept).nonzero().flatten().tolist())


def test_tiles_beside_other_kinds_have_to_compete(tiles):
    model = family_model("llama")
    scores = random_scores(counts_of(model), "taylor")
    with pytest.raises(InputError, match="criterion: got 'taylor'; .*if units has neuron_tiles together with others"):
        plan_pruning(model, scores, 0.7, units=("neuron_tiles", "heads"))
    fisher = replace(scores, criterion="fisher")
    assert plan_pruning(model, fisher, 0.5, units=("neuron_tiles", "heads")).kept <= 0.5
