"""What the pruning section lets through is what planning does; what it refuses gets one line per fault."""

from itertools import chain, combinations, product

import pytest
from builders.families import family_model
from builders.models import random_batch
from builders.recipes import recipe_for

from distill_llm.common.errors import InputError, faults_in
from distill_llm.pruning.importance import score
from distill_llm.pruning.names import UNITS
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.leave_one_out import leave_one_out
from distill_llm.pruning.units.costs import COSTS
from distill_llm.pruning.units.sizes import counts_of
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.recipe import parse_recipe


def faults(folder, **pruning) -> list[str]:
    """The section's faults as lines; none where it passes."""
    try:
        parse_recipe(recipe_for(folder, pruning={"keep": 0.5, **pruning}))
    except InputError as error:
        return [str(fault) for fault in faults_in(error)]
    return []


def test_costs_are_those_of_the_library():
    assert set(PruningSection.model_fields["cost"].annotation.__args__) == {*COSTS, "latency"}


@pytest.mark.parametrize(
    ("pruning", "line"),
    [
        (
            {"criterion": "leave_one_out"},
            "pruning.units: got ['heads', 'neurons']; set them to [layers], or set leave",
        ),
        (
            {"units": ["attention"], "criterion": "block_influence"},
            "pruning.units: got ['attention']; set them to [layers]",
        ),
        (
            {"units": ["attention", "ffn"], "criterion": "wanda"},
            "pruning.criterion: got 'wanda'; set it to fisher or gisp if units",
        ),
        (
            {"units": ["ffn", "heads"], "scope": "local"},
            "pruning.scope: got 'local'; set it to global if units has ffn",
        ),
        (
            {"units": ["queries", "heads"], "uniform": True},
            "pruning.uniform: got True; set it to false if units has queries",
        ),
        (
            {"units": ["hidden"], "scope": "local"},
            "pruning.scope: got 'local'; set it to global: these units are not of one layer",
        ),
        (
            {"units": ["hidden"], "uniform": True},
            "pruning.uniform: got True; leave it out: it counts only if units has heads",
        ),
        (
            {"units": ["heads"], "round_to": 8},
            "pruning.round_to: got 8; leave it out: it counts only if units has neurons or hidden",
        ),
        (
            {"units": ["neurons"], "min_heads": 1},
            "pruning.min_heads: got 1; leave it out: it counts only if units has heads",
        ),
        (
            {"units": ["heads"], "min_neurons": 8},
            "pruning.min_neurons: got 8; leave it out: it counts only if units has neurons",
        ),
        (
            {"criterion": "magnitude", "loss": "kl"},
            "pruning.loss: got 'kl'; leave it out: criterion magnitude reads no loss",
        ),
        (
            {"units": ["layers"], "layer_criterion": "block_influence"},
            "pruning.layer_criterion: got 'block_influence'; leave it out: it counts only if units has layers and other",
        ),
        (
            {"criterion": "activation", "layer_criterion": "wanda"},
            "pruning.layer_criterion: got 'wanda'; leave it out: it counts only if units has layers and other",
        ),
        (
            {"units": ["layers", "ffn"], "layer_criterion": "block_influence"},
            "pruning.layer_criterion: got 'block_influence'; leave it out if units has layers and ffn together",
        ),
        ({"keep": None, "layers": [0], "cuts": 2}, "pruning.cuts: got 2; leave it out: `layers`"),
        (
            {"keep": None, "layers": [0], "cost": "latency"},
            "pruning.cost: got 'latency'; choose params, flops or memory",
        ),
        ({"keep": None, "layers": [0], "statistics": "s"}, "pruning.statistics: got 's'; leave it out: `layers`"),
        (
            {"units": ["layers"], "moment_layers": 1},
            "pruning.moment_layers: got 1; leave it out: only compensation",
        ),
        (
            {"compensate": False, "moment_layers": 4},
            "pruning.moment_layers: got 4; leave it out: only compensation",
        ),
        ({"offload": True}, "pruning.checkpointing: got False; set it to true"),
        (
            {"offload": True, "checkpointing": True, "cost": "latency"},
            "pruning.cost: got 'latency'; choose params, flops or memory: with offload",
        ),
        (
            {"compensate": "in_order", "units": ["neurons", "hidden"]},
            "pruning.compensate: got 'in_order'; set it to true, or leave hidden out",
        ),
        (
            {"scales": {}, "offload": True, "checkpointing": True},
            "pruning.scales: got {'steps': 200, 'learning_rate': 0.02}; ",
        ),
        (
            {"scales": {}, "masks": {}},
            "pruning.scales: got {'steps': 200, 'learning_rate': 0.02}; leave it out: weights are",
        ),
        (
            {"scales": {}, "keep": None, "weights": {"sparsity": 0.5}},
            "pruning.scales: got {'steps': 200, 'learning_rate': 0.02}; leave it out: no unit is removed",
        ),
        ({"scales": {"learning_rate": float("inf")}}, "pruning.scales.learning_rate: got inf; accepted: a number"),
        ({"compensate": "inorder"}, "pruning.compensate: got 'inorder'; accepted: true, false or in_order"),
        ({"compensate": 1}, "pruning.compensate: got 1; accepted: true, false or in_order"),
        ({"cuts": 0}, "pruning.cuts: got 0; accepted: a whole number of at least 1"),
        ({"loss": "logits"}, "pruning.loss: got 'logits'; accepted: "),
    ],
    ids=str,
)
def test_fields_that_contradict_each_other_give_one_line(tmp_path, pruning, line):
    (found,) = faults(tmp_path, **pruning)
    assert found.startswith(line)


def test_what_goes_together_passes(tmp_path):
    for pruning in (
        {"units": ["hidden", "heads", "neurons"], "round_to": 8, "criterion": "wanda", "scope": "local"},
        {"units": ["attention", "ffn", "neurons"], "cuts": 4, "loss": "kl", "cost": "latency"},
        {"units": ["layers"], "criterion": "leave_one_out", "loss": "labels", "cost": "memory"},
        {"units": ["queries"], "uniform": True, "criterion": "magnitude_l1"},
        {
            "units": ["layers", "heads", "neurons", "hidden"],
            "uniform": True,
            "criterion": "activation",
            "layer_criterion": "leave_one_out",
            "loss": "kl",
        },
        {"min_heads": 1, "min_neurons": 16, "statistics": "~/statistics.safetensors"},
        {"criterion": "activation", "loss": "kl", "statistics": "~/statistics.safetensors"},
    ):
        assert faults(tmp_path, **pruning) == []


@pytest.fixture(scope="module")
def scored():
    """A decoder with two queries a group, and its statistics."""
    model = family_model("llama")
    batches = [random_batch(model, labels=False)]
    return model, leave_one_out(model, batches, collect_statistics(model, batches, "kl"), "kl")


def removed(model, plan) -> set[str]:
    """The kinds of units of which a plan removes some."""
    sizes, found = counts_of(model), set()
    found |= {"layers"} if len(plan.layers) < len(sizes) else set()
    found |= {"hidden"} if plan.hidden is not None else set()
    for row in plan.layers:
        size = sizes[row.source]
        found |= {"heads", "attention"} if len(row.heads) < size["heads"] else set()
        found |= {"neurons", "ffn"} if len(row.neurons) < size["neurons"] else set()
        found |= {"queries"} if row.queries is not None else set()
    return found


@pytest.mark.parametrize("criterion", ["fisher", pytest.param("taylor", marks=pytest.mark.slow), "leave_one_out"])
def test_every_combination_that_passes_is_planned_within_its_budget_and_ignores_no_unit(tmp_path, scored, criterion):
    model, statistics = scored
    scores, planned, given = score(statistics, criterion), 0, {"keep": 0.5, "criterion": criterion}
    subsets = chain.from_iterable(combinations(UNITS, count) for count in (1, 2, 3, len(UNITS)))
    for units, scope, uniform in product(subsets, ("global", "local"), (False, True)):
        try:
            PruningSection(**given, units=list(units), scope=scope, uniform=uniform)
        except ValueError:
            continue
        try:
            plan = plan_pruning(model, scores, 0.6, units=units, scope=scope, uniform=uniform)
        except InputError as error:
            assert error.field == "keep", (units, scope, uniform, str(error))
            continue
        planned += 1
        assert plan.kept <= 0.6 + 1e-9, (units, scope, uniform)
        gone = removed(model, plan)
        allowed = (
            set(units) | ({"attention"} if "heads" in units else set()) | ({"ffn"} if "neurons" in units else set())
        )
        allowed |= {"heads"} if "attention" in units else set()
        allowed |= {"neurons"} if "ffn" in units else set()
        assert gone <= allowed, (units, scope, uniform)
        if criterion == "taylor":  # a few whole layers may be all that has to go
            assert set(units) <= gone or "layers" in {*units} & gone, (units, scope, uniform)
    assert planned == 2 if criterion == "leave_one_out" else planned > 20
