"""docs/development/add-a-unit.md: its kinds are added and removed from models; nothing else is edited for them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders.families import assert_equal, family_batch, family_model, outputs_of
from builders.models import random_batch, tiny_model
from builders.pruning import flops_of, random_scores
from builders.recipes import recipe_for
from torch import nn
from transformers import BertModel

from distill_llm import load_pretrained, masked, plan_pruning, prune
from distill_llm.architectures.families import FAMILIES, layers_of
from distill_llm.architectures.lineage import LAYER_UNITS, lineage_of
from distill_llm.common.errors import InputError
from distill_llm.pipeline.rounds import Cutter
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.names import UNITS
from distill_llm.pruning.plan import LayerPlan, PruningPlan, full_plan
from distill_llm.pruning.planning.latency_costs import latency_costs
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.pruning.units.sizes import counts_of
from distill_llm.recipe.recipe import parse_recipe

TEXT = (Path(__file__).parents[3] / "docs" / "development" / "add-a-unit.md").read_text()
KIND, USE, OWN = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


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


# A kind with indices of its own.

CHANNELS = 12


class Adapter(nn.Module):
    """A bottleneck beside its input."""

    def __init__(self, hidden: int):
        super().__init__()
        self.down, self.up = nn.Linear(hidden, CHANNELS), nn.Linear(CHANNELS, hidden)

    def forward(self, states):
        return states + self.up(self.down(states).relu())


class AdaptedBert(BertModel):
    """A BERT with an adapter behind every FFN."""

    def __init__(self, config):
        super().__init__(config)
        for layer in self.encoder.layer:
            layer.output.dropout = Adapter(config.hidden_size)


def scores_with_adapters(model, criterion: str) -> Importance:
    own, generator = random_scores(counts_of(model), criterion), torch.Generator().manual_seed(1)
    adapters = tuple(torch.rand(CHANNELS, generator=generator) for _ in layers_of(model))
    return Importance(criterion, units={**own.units, "adapters": adapters})


@pytest.fixture
def adapted():
    """A model with adapters, and the page's second kind in the tables."""
    row = FAMILIES["bert"]
    exec(OWN, {})
    torch.manual_seed(0)
    yield AdaptedBert(family_model("bert", attn_implementation="eager").config).eval()
    del KINDS["adapters"], LAYER_UNITS["adapters"]
    FAMILIES["bert"] = row


def params(model) -> int:
    return sum(parameter.numel() for parameter in layers_of(model).parameters())


def test_a_kind_with_indices_of_its_own_is_counted_and_priced_without_an_edit(adapted):
    """Against parameters counted one by one, FLOPs that torch counts, and times that follow a law."""
    assert counts_of(adapted) == [{"heads": 8, "neurons": 64, "queries": 8, "adapters": CHANNELS}] * 5
    costs, whole = unit_costs(adapted), params(adapted)
    assert costs.of(counts_of(adapted)) == pytest.approx(whole)
    assert costs.at("adapters") == 2 * 32 + 1, "a row with its bias, and a column"
    assert unit_costs(adapted, "memory").at("adapters") == 4 * (2 * 32 + 1)
    flops = unit_costs(adapted, "flops", 3, 12)
    assert flops.at("adapters") == 2 * 2 * 32
    assert flops.of(counts_of(adapted)) == pytest.approx(flops_of(adapted, 12, 3) / (3 * 12))


@pytest.mark.slow
def test_a_kind_with_indices_of_its_own_is_timed_with_the_others(adapted, tmp_path):
    def milliseconds(run) -> float:
        counts = run.counts
        return run.hidden * (0.02 * counts["heads"] + 0.003 * counts["neurons"] + 0.007 * counts["adapters"] + 0.1)

    def clock(first, second):
        return milliseconds(first) / 1e3, milliseconds(second) / milliseconds(first)

    costs = latency_costs(adapted, 2, 8, clock=clock, cache_dir=tmp_path)
    assert [costs.at(kind) / 32 for kind in ("heads", "neurons", "adapters")] == pytest.approx([0.02, 0.003, 0.007])


@pytest.mark.parametrize("options", [{}, {"scope": "local"}, {"uniform": True}], ids=str)
@pytest.mark.parametrize("criterion", ["fisher", "taylor"])
def test_a_kind_with_indices_of_its_own_shares_and_competes_like_the_others(adapted, criterion, options, tmp_path):
    scores = scores_with_adapters(adapted, criterion)
    plan = plan_pruning(adapted, scores, 0.6, units=("adapters", "heads", "neurons"), **options)
    student = prune(adapted, plan)
    assert 0.99 * 0.6 <= params(student) / params(adapted) <= 0.6
    kept = [row["adapters"] for row in counts_of(student)]
    assert 0 < sum(kept) < 5 * CHANNELS
    if options:
        shares = [row["heads"] / 8 for row in counts_of(student)]
        assert (
            len(set(kept)) == len(set(shares)) == 1 and abs(kept[0] / CHANNELS - shares[0]) <= 0.5 / 8 + 0.5 / CHANNELS
        )
    for row, has in zip(plan.layers, scores.adapters, strict=True):
        best = has.argsort(descending=True)[: len(row.adapters)].sort().values.tolist()
        assert list(row.adapters) == best, "the best stay"
    plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == plan
    batch = family_batch(adapted)
    with masked(adapted, plan):
        expected = outputs_of(adapted, batch)
    assert_equal(outputs_of(student, batch), expected)
    again = [LayerPlan(i, range(len(r.heads)), range(len(r.neurons)), adapters=(0,)) for i, r in enumerate(plan.layers)]
    smaller = prune(student, PruningPlan("bert", again))
    assert [row.adapters for row in lineage_of(smaller).layers] == [row.adapters[:1] for row in plan.layers]


def test_plans_that_do_not_name_the_kind_keep_all_of_it(adapted):
    plan = plan_pruning(adapted, scores_with_adapters(adapted, "taylor"), 0.6)
    assert {row.adapters for row in plan.layers} == {None} and {row.adapters for row in full_plan(adapted).layers} == {
        None
    }
    assert {row["adapters"] for row in counts_of(prune(adapted, plan))} == {CHANNELS}
