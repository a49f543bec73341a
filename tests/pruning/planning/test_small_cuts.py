"""Several small cuts: their shares, and the one plan that they make together."""

import pytest
import torch
from builders.families import family_batch, family_model, outputs_of, uneven_plan

from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.planning.small_cuts import compose_plans, cut_shares


def test_every_cut_keeps_the_same_part_of_what_it_finds_and_the_last_ends_where_the_round_does():
    shares = cut_shares(0.8, 0.1, 3)
    assert shares == pytest.approx([0.4, 0.2, 0.1]) and shares[-1] == 0.1
    assert cut_shares(1.0, 0.5, 1) == [0.5]


@pytest.mark.parametrize("family", ["bert", "llama", "gpt_neox"])
def test_the_composed_plan_leaves_what_the_cuts_leave_one_after_the_other(family):
    model = family_model(family)
    first = uneven_plan(model, hidden=True, queries=True)
    small = prune(model, first)
    rows = (
        LayerPlan(0, (1,), tuple(range(0, 35, 2))),
        LayerPlan(2, (0, 2), ()),
        LayerPlan(3, (0,), (1, 2)),
    )
    second = PruningPlan(model.config.model_type, rows, 0.3, "why", hidden=tuple(range(3, 25)))
    composed = compose_plans(model, first, second)
    assert [row.source for row in composed.layers] == [0, 3, 4]
    assert composed.layers[0].neurons == tuple(range(5, 40, 2))
    assert (composed.kept, composed.note) == (0.3, "why")
    composed.check(model)
    batch = family_batch(model)
    assert torch.equal(outputs_of(prune(model, composed), batch), outputs_of(prune(small, second), batch))


def test_queries_that_a_later_cut_takes_are_those_of_the_model_that_was_cut_first():
    model = family_model("llama")  # two queries a group
    whole = tuple(range(64))
    first = PruningPlan("llama", (LayerPlan(0, (0, 2), whole),))
    second = PruningPlan("llama", (LayerPlan(0, (0, 1), whole, (1, 2)),))
    assert compose_plans(model, first, second).layers == (LayerPlan(0, (0, 2), whole, (1, 4)),)
    third = PruningPlan("llama", (LayerPlan(0, (1,), whole),))
    assert compose_plans(model, compose_plans(model, first, second), third).layers[0].queries == (4,)
    assert compose_plans(model, first, third).layers[0].queries is None
