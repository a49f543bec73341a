"""Masks that learn: the hard concrete distribution, the expected size, the multipliers, the plan, and the weights afterwards."""

import itertools

import numpy as np
import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.pruning import layer_params, plan_of
from builders.trainers import causal_model

from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.masking import masked
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.learning.hard_concrete import gate_of, open_probability, sampled, settled
from distill_llm.pruning.learning.masks import OPEN, MaskBudget, learned_masks
from distill_llm.pruning.planning.rules import Limits, PlanningRules
from distill_llm.pruning.units.costs import unit_costs

ALPHAS = np.array([-6.0, -2.4, -0.5, 0.0, 1.0, 3.0])


def masks_of(model, by="l0", keep=0.5, units=("heads", "neurons"), cost="params", warm_up=0.5, **rules):
    fine = [unit for unit in units if unit in ("heads", "neurons")]
    rules = PlanningRules(fine, **rules)
    blocks = [unit for unit in units if unit not in fine]
    return learned_masks(model, by, MaskBudget(keep, unit_costs(model, cost), rules, warm_up, blocks))


def scattered(masks, seed=0):
    """Masks whose numbers are drawn."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in masks.parameters():
            parameter.normal_(0, 2, generator=draw)
    return masks


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def test_the_chance_of_an_open_gate_is_that_of_the_distribution_integrated_by_numbers():
    uniform = (np.arange(2_000_000) + 0.5) / 2_000_000
    for alpha in ALPHAS:
        concrete = 1 / (1 + np.exp(-(np.log(uniform) - np.log(1 - uniform) + alpha) / (2 / 3)))
        gates = np.clip(concrete * 1.2 - 0.1, 0, 1)
        found = open_probability(torch.tensor(alpha)).item()
        assert found == pytest.approx((gates > 0).mean(), abs=2e-6)
        mine = gate_of(torch.tensor(alpha, dtype=torch.float64), torch.from_numpy(uniform))
        np.testing.assert_allclose(mine.numpy(), gates, atol=1e-9)
    np.testing.assert_allclose(
        settled(torch.from_numpy(ALPHAS)).numpy(), np.clip(1.2 / (1 + np.exp(-ALPHAS)) - 0.1, 0, 1), atol=1e-12
    )
    torch.manual_seed(0)
    drawn = sampled(torch.full((100_000,), 0.3))
    assert (drawn > 0).float().mean().item() == pytest.approx(open_probability(torch.tensor(0.3)).item(), abs=0.005)
    assert ((drawn > 0) & (drawn < 1)).any() and (drawn == 1).any() and drawn.isfinite().all()


@pytest.mark.parametrize("units", [("heads", "neurons"), ("heads", "neurons", "attention", "ffn"), ("neurons",)])
def test_the_expected_share_is_the_mean_over_all_ways_the_gates_can_fall(units):
    model = tiny_model(layers=1, intermediate=5)
    masks = scattered(masks_of(model, units=units, keep=0.99))
    kinds = [run.kind for run in masks.units.runs for _ in range(run.count)]
    blocks = [run.kind for run in masks.units.blocks]
    chances = [open_probability(each).tolist() for each in (masks.units_log_alpha, masks.blocks_log_alpha)]
    counted = {}
    for heads, neurons in itertools.product(range(5), range(6)):
        plan = plan_of(model, [(0, range(heads), range(neurons))])
        counted[heads, neurons] = layer_params(prune(model, plan)) / layer_params(model)
    mean = 0.0
    for states in itertools.product((0, 1), repeat=len(kinds) + len(blocks)):
        fine, coarse = states[: len(kinds)], dict(zip(blocks, states[len(kinds) :], strict=True))
        chance = np.prod([p if state else 1 - p for p, state in zip([*chances[0], *chances[1]], states, strict=True)])
        stays = {"heads": 0 if "heads" in kinds else 4, "neurons": 0}
        for kind, state in zip(kinds, fine, strict=True):
            stays[kind] += state * coarse.get(kind, 1)
        mean += chance * counted[stays["heads"], stays["neurons"]]
    assert masks.expected_share().item() == pytest.approx(mean, abs=1e-6)


def test_the_target_falls_over_the_warm_up():
    model = tiny_model()
    for by, halfway in (("l0", 1 - 0.8 * 0.5), ("movement", 0.2 + 0.8 * 0.125)):
        masks = masks_of(model, by, keep=0.2, warm_up=0.4)
        found = []
        for masks.progress in (0.0, 0.2, 0.4, 0.9):
            found.append(masks.target)
        assert found == pytest.approx([1.0, halfway, 0.2, 0.2])


def test_multipliers_climb_and_gates_descend_by_hand():
    masks = scattered(masks_of(tiny_model(), keep=0.3, warm_up=0.5))
    masks.progress = 0.25  # the target is 0.65
    with torch.no_grad():
        masks.multipliers.copy_(torch.tensor([0.4, 2.0]))
    before = masks.units_log_alpha.detach().clone()
    shifted = before.double() + 2 / 3 * np.log(11)
    chance = torch.sigmoid(shifted)
    share = masks.units.rest + (chance * masks.units.costs).sum()
    gap = share.item() - 0.65
    penalty = masks.penalty()
    assert penalty.item() == pytest.approx(0.4 * gap + 2.0 * gap**2, rel=1e-4)
    penalty.backward()
    torch.optim.SGD(masks.parameters(), lr=0.5).step()
    assert masks.multipliers.tolist() == pytest.approx([0.4 + 0.5 * gap, 2.0 + 0.5 * gap**2], rel=1e-4)
    slope = (0.4 + 2 * 2.0 * gap) * masks.units.costs * chance * (1 - chance)
    torch.testing.assert_close(
        masks.units_log_alpha.detach().double(), before.double() - 0.5 * slope, rtol=0, atol=1e-6
    )


def test_movement_keeps_the_best_scores_within_the_cost_and_its_gradients_go_straight_through():
    model = tiny_model(layers=2)
    masks = scattered(masks_of(model, "movement", keep=0.4))
    masks.progress = 1.0
    order = masks.scores.argsort(descending=True).tolist()
    left, kept = 0.4 - masks.units.rest, set()
    for unit in order:
        left -= masks.units.costs[unit].item()
        if left < 0:
            break
        kept.add(unit)
    assert set(masks.settled().nonzero().flatten().tolist()) == kept
    assert {
        run.kind for run in masks.units.runs for unit in kept if unit in range(run.start, run.start + run.count)
    } == {
        "heads",
        "neurons",
    }
    weights = torch.randn(len(masks.units))
    values = masks.values()
    assert torch.equal(values.detach(), masks.settled())  # to the bit
    (values * weights).sum().backward()
    assert torch.equal(masks.scores.grad, weights)


def out_of_order(worth, stays, leaving_out):
    """How many units go though one of less worth stays; some left out."""
    counted = torch.tensor([unit not in leaving_out for unit in range(len(worth))])
    kept, gone = worth[stays & counted], worth[~stays & counted]
    return int((gone > kept.min()).sum()) if len(gone) and len(kept) else 0


@pytest.mark.parametrize("units", [("heads", "neurons"), ("heads", "neurons", "attention", "ffn"), ("neurons",)])
@pytest.mark.parametrize("by", ["l0", "movement"])
def test_the_hardened_model_is_the_cut_model_and_its_plan_meets_the_budget(by, units):
    if by == "movement" and len(units) == 4:
        units = ("heads",)
    model, keep = tiny_model(layers=4), 0.8 if units == ("heads",) else 0.6
    masks, batch = scattered(masks_of(model, by, keep, units)), random_batch(model)
    whole = logits(model, batch)
    masks.progress = 1.0
    with masks.applied(model):
        learnt = logits(model, batch)
    assert not torch.allclose(learnt, whole, atol=1e-3)
    torch.testing.assert_close(logits(model, batch), whole)  # nothing stays behind
    settled = masks.settled()
    plan = masks.harden(model)
    cut = prune(model, plan)
    torch.testing.assert_close(logits(cut, batch), logits(model, batch), rtol=1e-4, atol=1e-5)
    with masked(model, plan):
        torch.testing.assert_close(logits(model, batch), logits(cut, batch), rtol=1e-4, atol=1e-5)
    counted = layer_params(cut) / layer_params(model)
    assert plan.kept == pytest.approx(counted) and keep * 0.99 - 0.02 * (units == ("heads",)) <= counted <= keep + 1e-9
    # The units with the best values stay, whatever they cost.
    worth = masks.worth()
    stays = torch.zeros(len(worth), dtype=torch.bool)
    for row in plan.layers:
        for run in masks.units.runs:
            if run.layer == row.source:
                stays[run.start + torch.tensor(row.units[run.kind], dtype=torch.long)] = True
    heads = {run.start + j for run in masks.units.runs if run.kind == "heads" for j in range(run.count)}
    neurons = set(range(len(worth))) - heads
    assert out_of_order(worth, stays, heads) <= 1 and out_of_order(worth, stays, neurons) <= 1
    # Among both, but for heads that are too large for what is left of the budget.
    left_out = (set(some) for number in range(3) for some in itertools.combinations(heads, number))
    assert min(out_of_order(worth, stays, some) for some in left_out) <= 1
    if by == "l0":
        assert ((settled[stays] > 0) & (settled[stays] < 1)).any()  # such a gate is folded, not rounded


def test_gates_that_are_folded_give_what_the_masked_model_gave_where_all_that_stays_is_open():
    model = tiny_model(layers=2)
    masks, batch = masks_of(model, keep=0.6), random_batch(model)
    torch.manual_seed(0)
    chosen = torch.rand(len(masks.units)) < 0.6
    with torch.no_grad():
        masks.units_log_alpha.copy_(torch.where(chosen, torch.rand(len(chosen)) * 4 - 1, -8.0))
    masks.budget = MaskBudget(float(masks.units.share(chosen.double())), masks.budget.costs, masks.budget.rules)
    with masks.applied(model):
        learnt = logits(model, batch)
    plan = masks.harden(model)
    torch.testing.assert_close(logits(prune(model, plan), batch), learnt, rtol=1e-4, atol=1e-5)


def test_groups_of_queries_are_masked_together_and_conv1d_weights_too():
    for model in (causal_model(), causal_model("gpt2")):
        masks = scattered(masks_of(model, keep=0.6, cost="flops"))
        batch = {"input_ids": random_batch(model, labels=False)["input_ids"]}
        masks.progress = 1.0
        with masks.applied(model):
            learnt = logits(model, batch)
        masks.units.fold(model, masks.settled())
        torch.testing.assert_close(logits(model, batch), learnt, rtol=1e-4, atol=1e-5)
    llama = causal_model()
    masks = masks_of(llama)
    assert [run.count for run in masks.units.runs[:2]] == [2, 64]
    plan = scattered(masks).harden(llama)
    cut = prune(llama, plan)
    torch.testing.assert_close(logits(cut, batch), logits(llama, batch), rtol=1e-4, atol=1e-4)


def test_rules_of_a_plan_hold_and_gates_begin_open():
    model = tiny_model()
    masks = masks_of(model, keep=0.6, round_to=8, limits=Limits(1, 8))
    assert masks.settled().tolist() == [1.0] * len(masks.units)
    assert 0.98 < masks.expected_share().item() < 1 and torch.all(masks.units_log_alpha == OPEN)
    plan = scattered(masks).harden(model)
    assert all(len(row.neurons) % 8 == 0 and row.neurons and row.heads for row in plan.layers)


def test_what_cannot_be_masked_is_refused_in_a_line():
    with pytest.raises(InputError, match="leave heads out of units"):
        masks_of(causal_model("olmo2"))
    assert masks_of(causal_model("olmo2"), units=["neurons"], keep=0.8) is not None
    with pytest.raises(InputError, match=r"masks.by: got 'l2'; accepted: l0, movement|masks.by"):
        masks_of(tiny_model(), "l2")


def test_a_budget_that_cannot_be_met_is_refused_before_any_training():
    with pytest.raises(InputError, match=r"keep: got 0.01; accepted: at least 0\.\d+ when only neurons can be removed"):
        masks_of(tiny_model(), units=["neurons"], keep=0.01)
    with pytest.raises(InputError, match="keep: got 1.5; accepted: a share above 0"):
        masks_of(tiny_model(), keep=1.5)
    with pytest.raises(InputError, match="masks.warm_up: got 0; accepted: a share of the steps"):
        masks_of(tiny_model(), warm_up=0)
    model = tiny_model()
    with pytest.raises(InputError, match=r"units: got \['layers'\]; accepted: heads and neurons"):
        learned_masks(model, "l0", MaskBudget(0.5, unit_costs(model), PlanningRules(["heads", "layers"])))


def test_whether_a_budget_can_be_met_is_found_without_a_plan(monkeypatch):
    def never(*args):
        raise AssertionError("a whole plan was made")

    monkeypatch.setattr("distill_llm.pruning.planning.competing._Competition", never)
    assert masks_of(tiny_model()) is not None
    with pytest.raises(InputError, match=r"keep: got 0.01; accepted: at least 0\.\d+ when only neurons can be removed"):
        masks_of(tiny_model(), units=["neurons"], keep=0.01)
    with pytest.raises(InputError, match="keep: got 1.5; accepted: a share above 0"):
        masks_of(tiny_model(), keep=1.5)


@pytest.mark.parametrize("by", ["l0", "movement"])
def test_masks_are_hardened_once(by):
    model = tiny_model(layers=2)
    masks, batch = scattered(masks_of(model, by)), random_batch(model)
    plan, folded = masks.harden(model), logits(model, batch)
    line = r"^masks: got 'masks that are hardened'; use their `plan`: they are in the weights already"
    with pytest.raises(InputError, match=line):
        masks.harden(model)
    with pytest.raises(InputError, match=line), masks.applied(model):
        pass
    assert masks.plan == plan and torch.equal(logits(model, batch), folded)


def test_gates_that_are_all_but_open_are_told_apart():
    model = tiny_model(layers=2)
    masks = masks_of(model, keep=0.8, units=["neurons"])
    log_alpha = 16 + 8 * torch.rand(len(masks.units), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        masks.units_log_alpha.copy_(log_alpha)
    masks.harden(model)
    stays = masks.stays() > 0
    assert 0 < stays.sum() < len(stays) and log_alpha[stays].min() > log_alpha[~stays].max()


def test_masks_are_saved_and_read_as_plan_and_scores(tmp_path):
    from distill_llm.pruning.importance import Importance
    from distill_llm.pruning.learning.masks import PLAN, SCORES
    from distill_llm.pruning.plan import PruningPlan

    model = tiny_model()
    masks = scattered(masks_of(model))
    scores, plan = masks.importance(model), masks.harden(model)
    masks.save(tmp_path)
    assert PruningPlan.load(tmp_path / PLAN) == plan
    assert torch.equal(Importance.load(tmp_path / SCORES).heads[1], scores.heads[1])
