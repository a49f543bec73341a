"""Compensation against an independent least-squares solution, and what it does to the outputs."""

import numpy as np
import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.pruning import collect, inputs_of, layers_in, linears_in, plan_of, without

from distill_llm.common.errors import InputError
from distill_llm.measuring.live import LiveStorages
from distill_llm.pruning.compensation.linear import compensate_linear
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import full_plan, keep_layers
from distill_llm.pruning.statistics.moments import RIDGE, Moments, MomentsSum

KEPT = torch.tensor([0, 2, 3, 7, 8])


@pytest.fixture
def linear():
    """A linear's weight and bias, and correlated inputs with means that are not zero."""
    torch.manual_seed(0)
    x = torch.randn(400, 6) @ torch.randn(6, 12) + 0.3 * torch.randn(400, 12) + torch.randn(12)
    return torch.randn(9, 12), torch.randn(9), x


def moments_of(x):
    total = MomentsSum(x.shape[1], x.device)
    total.add(x)
    return total.finish()


def test_many_tokens_pass_the_buffer_and_count_once(monkeypatch):
    monkeypatch.setattr(MomentsSum, "rows", 7)
    x, weights = torch.randn(50, 10), torch.rand(50, 1)
    total = MomentsSum(10, torch.device("cpu"))
    for part, weight in zip(x.split(3), weights.split(3), strict=True):
        total.add(part, weight)
    found = total.finish()
    torch.testing.assert_close(found.second, (weights * x).T @ x / weights.sum())
    torch.testing.assert_close(found.mean, (weights * x).sum(0) / weights.sum())


def test_sums_are_freed_as_means_are_made_and_these_are_symmetric():
    total = MomentsSum(64, torch.device("cpu"))
    total.add(torch.randn(70, 64))
    known = total.tensors()
    with LiveStorages(known) as live:
        found = total.finish()
    assert live.peak < 1.2 * found.second.nbytes and torch.equal(found.second, found.second.T)


def test_all_tokens_are_taken_until_half_as_many_as_channels_then_one_in_four():
    torch.manual_seed(0)
    for share, expected in ((None, [10, 2 + 2, 3, 2]), (0.5, [5, 5, 5, 5]), (1.0, [10] * 4)):
        total, found = MomentsSum(24, torch.device("cpu"), share), []
        for number in range(4):
            total.add(torch.randn(10, 24), None, torch.rand(10), 10 * number)
            found.append(len(total._buffer[-1]))
        assert found == expected
        assert float(total.tensors()[0]) == pytest.approx(40), "those that are taken stand for the others"


def test_of_batches_that_are_smaller_than_what_one_token_stands_for_one_is_taken():
    total = MomentsSum(2, torch.device("cpu"), 0.1)
    for number in range(6):
        total.add(torch.full((2, 2), float(number**2)), None, torch.rand(2), 2 * number)
    found = total.finish()
    torch.testing.assert_close(found.mean, torch.full((2,), 55 / 6))


def test_no_position_of_a_row_is_preferred():
    """The first moment of one-hot positions is how often each was taken; a fixed step took the first a fourth of the time."""
    generator = torch.Generator().manual_seed(0)
    total = MomentsSum(16, torch.device("cpu"), 0.25)
    for number in range(200):
        total.add(torch.eye(16).repeat(4, 1), None, torch.rand(64, generator=generator), 64 * number)
    found = total.finish().mean
    assert float((found - 1 / 16).abs().max()) < 0.015 and float(found.sum()) == pytest.approx(1)


def test_tokens_without_weight_take_no_place_and_the_total_is_unbiased():
    generator = torch.Generator().manual_seed(0)
    x, weights = torch.randn(40, 6, generator=generator), torch.zeros(40, 1)
    weights[::4] = torch.rand(10, 1, generator=generator)
    exact = (weights * x).T @ x
    few = MomentsSum(6, torch.device("cpu"), 0.25)
    few.add(x, weights, torch.rand(40, generator=generator))
    torch.testing.assert_close(few.finish().second, exact / weights.sum())
    total, sums = 0.0, torch.zeros(21)
    for _ in range(4000):
        half = MomentsSum(6, torch.device("cpu"), 0.125)  # five of the ten that count
        half.add(x, weights, torch.rand(40, generator=generator))
        weight, _, *rows = half.tensors()  # from the diagonal on
        total, sums = total + float(weight) / 4000, sums + torch.cat([row.flatten() for row in rows]) / 4000
    assert total == pytest.approx(float(weights.sum()), rel=0.02)
    upper = exact[tuple(torch.triu_indices(6, 6))]
    torch.testing.assert_close(sums, upper, rtol=0, atol=0.02 * float(exact.abs().max()))


def test_where_the_first_token_alone_has_a_gradient_all_first_tokens_are_taken():
    model = tiny_model(layers=2)
    batches = [random_batch(model, batch=8, length=16, padded=False, seed=seed) for seed in range(20)]
    part, every = collect(model, batches, moment_share=0.25), collect(model, batches)
    assert torch.equal(part.moments[0][1].second, part.moments[0][1].second.T)
    for mine, its in zip(part.moments[1], every.moments[1], strict=True):
        torch.testing.assert_close(mine.second, its.second, rtol=1e-4, atol=1e-5)
    for mine, its in zip(part.moments[0], every.moments[0], strict=True):
        error = float((mine.second - its.second).norm() / its.second.norm())
        assert 0.001 < error < 0.15, "of tokens that all count, a part was taken"


def least_squares(weight, x, kept, intercept):
    """What the kept columns (and a constant) say best about the removed ones' output, the ridge as further rows."""
    x, weight = x.double().numpy(), weight.double().numpy()
    kept = kept.tolist()
    removed = [j for j in range(x.shape[1]) if j not in kept]
    inputs = np.hstack([x[:, kept], np.ones((len(x), int(intercept)))]) / np.sqrt(len(x))
    ridge = np.sqrt(RIDGE * np.mean(x**2)) * np.eye(len(kept), inputs.shape[1])
    target = x[:, removed] @ weight[:, removed].T / np.sqrt(len(x))
    rows = np.vstack([target, np.zeros((len(kept), len(weight)))])
    found = np.linalg.lstsq(np.vstack([inputs, ridge]), rows, rcond=None)[0].T
    return weight[:, kept] + found[:, : len(kept)], found[:, len(kept) :].sum(1)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_new_weights_solve_the_ridge_regression_of_the_removed_output(linear, with_bias):
    weight, bias, x = linear
    found, new_bias = compensate_linear(weight, bias if with_bias else None, moments_of(x), KEPT)
    expected, shift = least_squares(weight, x, KEPT, with_bias)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    if with_bias:
        np.testing.assert_allclose(new_bias - bias, shift, atol=1e-4)
    else:
        assert new_bias is None


def test_the_error_of_every_output_is_at_most_that_of_plain_removal(linear):
    weight, bias, x = linear
    dense = x @ weight.T + bias
    found, new_bias = compensate_linear(weight, bias, moments_of(x), KEPT)
    plain = (x[:, KEPT] @ weight[:, KEPT].T + bias - dense).square().mean(0)
    better = (x[:, KEPT] @ found.T + new_bias - dense).square().mean(0)
    assert (better <= plain).all()
    assert better.sum() < 0.5 * plain.sum()


def test_removing_nothing_changes_nothing_and_removing_all_leaves_the_mean(linear):
    weight, bias, x = linear
    same, same_bias = compensate_linear(weight, bias, moments_of(x), torch.arange(12))
    assert torch.equal(same, weight)
    assert torch.equal(same_bias, bias)
    none, mean = compensate_linear(weight, bias, moments_of(x), torch.tensor([], dtype=torch.long))
    assert none.shape == (9, 0)
    torch.testing.assert_close(mean, bias + weight @ x.mean(0), rtol=1e-4, atol=1e-4)


def test_inputs_that_repeat_each_other_are_folded_without_loss(linear):
    weight, bias, x = linear
    x[:, 1] = x[:, 0]
    found, new_bias = compensate_linear(weight, bias, moments_of(x), torch.tensor([0, *range(2, 12)]), ridge=1e-9)
    torch.testing.assert_close(found[:, 0], weight[:, 0] + weight[:, 1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(new_bias, bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_pruned_layers_are_compensated_from_the_calibration_inputs_of_their_own_linears(family):
    model = tiny_model(family, layers=2)
    batch = random_batch(model, batch=16)
    statistics = collect(model, [batch], loss=None)
    rows = [(0, (0, 3), range(30)), (1, (), range(10, 64))]
    student = prune(model, plan_of(model, rows), compensate=statistics)
    modules = [module for pair in linears_in(model) for module in pair]
    with inputs_of(modules) as seen, torch.no_grad():
        model(**batch)
    valid = batch["attention_mask"].bool()
    kept = [[*range(8), *range(24, 32)], range(30), [], range(10, 64)]
    new = [module for pair in linears_in(student) for module in pair]
    for place, (old, made) in enumerate(zip(modules, new, strict=True)):
        weight, shift = least_squares(
            old.weight.detach(), seen[place][valid], torch.tensor([*kept[place]]).long(), True
        )
        np.testing.assert_allclose(made.weight.detach(), weight, atol=1e-3)
        np.testing.assert_allclose((made.bias - old.bias).detach(), shift, atol=1e-3)


def test_the_compensated_model_is_nearer_to_the_dense_one_on_calibration_data_and_on_others():
    model = tiny_model(layers=2)
    batches = [random_batch(model, batch=32, length=16, seed=seed) for seed in range(9)]
    plan = plan_of(model, [(0, (0, 1, 2), range(48)), (1, (0, 2, 3), range(12, 60))])
    plain, better = prune(model, plan), prune(model, plan, collect(model, batches[:8], loss=None))
    for batch in (batches[0], batches[8]):
        with torch.no_grad():
            dense = model(**batch).logits
            far, near = (float((m(**batch).logits - dense).square().mean()) for m in (plain, better))
        assert near < far


@pytest.mark.parametrize("name", ["everything", "layers"])
def test_layers_that_lose_nothing_are_not_touched(name):
    model = tiny_model()
    statistics = collect(model, [random_batch(model)])
    plan = full_plan(model) if name == "everything" else keep_layers(model, [0, 2])
    student = prune(model, plan, compensate=statistics)
    for row, layer in zip(plan.layers, layers_in(student), strict=True):
        for mine, its in zip(layer.parameters(), layers_in(model)[row.source].parameters(), strict=True):
            assert torch.equal(mine, its)


def test_moments_that_rounding_left_indefinite_are_damped_until_they_can_be_solved(linear):
    weight, bias, x = linear
    mean, second = moments_of(x)
    worst = torch.linalg.eigh(second)[1][:, 0]
    broken = Moments(torch.zeros_like(mean), second - 2 * torch.outer(worst, worst))
    assert torch.linalg.eigvalsh(broken.second)[0] < -1.5
    found, _ = compensate_linear(weight, bias, broken, torch.arange(11), ridge=1e-2)
    damping = 1e-2 * broken.second.diagonal().mean().double()
    while torch.linalg.eigvalsh(broken.second[:11, :11].double())[0] + damping < 0:
        damping = 10 * damping
    s = broken.second.double()
    a = torch.linalg.solve(s[:11, :11] + damping * torch.eye(11), s[:11, 11:]).T
    torch.testing.assert_close(found, (weight[:, :11] + weight[:, 11:].double() @ a).float())
    broken.second[0, 0] = torch.nan
    with pytest.raises(InputError, match="compensate: got 'second moments that are not finite'"):
        compensate_linear(weight, bias, broken, torch.arange(11))


def test_statistics_without_moments_or_of_another_model_are_refused():
    model = tiny_model()
    batch = random_batch(model)
    plan = without(model, 0, "heads")
    with pytest.raises(InputError, match="compensate: got 'statistics without moments'"):
        prune(model, plan, collect(model, [batch], moments=False))
    other = tiny_model(intermediate=32)
    with pytest.raises(InputError, match="statistics of the model that is pruned"):
        prune(model, plan, collect(other, [batch]))
