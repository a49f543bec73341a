"""Compensation against an independent least-squares solution, and what it does to the outputs."""

import copy

import numpy as np
import pytest
import torch
from helpers import random_batch, tiny_model
from pruning_examples import inputs_of, layers_in, linears_in, plan_of, processor_with_bf16, without

from distill_llm.errors import InputError
from distill_llm.pruning.collecting import collect_statistics
from distill_llm.pruning.moments import MomentsSum, compensate_linear
from distill_llm.pruning.plan import full_plan, keep_layers
from distill_llm.pruning.surgery import prune

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
    monkeypatch.setattr(MomentsSum, "stride", 1)
    x = torch.randn(50, 10)
    total = MomentsSum(10, torch.device("cpu"))
    for part in x.split(3):
        total.add(part)
    found = total.finish()
    torch.testing.assert_close(found.second, x.T @ x / 50)
    torch.testing.assert_close(found.mean, x.mean(0))


def test_after_as_many_tokens_as_channels_one_in_four_stands_for_four():
    torch.manual_seed(0)
    parts = [torch.randn(8, 2) for _ in range(3)]
    total = MomentsSum(2, torch.device("cpu"))
    for part in parts:
        total.add(part)
    counted = torch.cat([parts[0], *(parts[i][::4] for i in (1, 2) for _ in range(4))])
    found = total.finish()
    torch.testing.assert_close(found.second, counted.T @ counted / len(counted))
    torch.testing.assert_close(found.mean, counted.mean(0))


def least_squares(weight, x, kept, intercept):
    """What the kept columns (and a constant) say best about the removed ones' output, the ridge as further rows."""
    x, weight = x.double().numpy(), weight.double().numpy()
    kept = kept.tolist()
    removed = [j for j in range(x.shape[1]) if j not in kept]
    inputs = np.hstack([x[:, kept], np.ones((len(x), int(intercept)))]) / np.sqrt(len(x))
    ridge = np.sqrt(1e-3 * np.mean(x**2)) * np.eye(len(kept), inputs.shape[1])
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
    statistics = collect_statistics(model, [batch], loss=None)
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
    plain, better = prune(model, plan), prune(model, plan, collect_statistics(model, batches[:8], loss=None))
    for batch in (batches[0], batches[8]):
        with torch.no_grad():
            dense = model(**batch).logits
            far, near = (float((m(**batch).logits - dense).square().mean()) for m in (plain, better))
        assert near < far


@pytest.mark.parametrize("name", ["everything", "layers"])
def test_layers_that_lose_nothing_are_not_touched(name):
    model = tiny_model()
    statistics = collect_statistics(model, [random_batch(model)])
    plan = full_plan(model) if name == "everything" else keep_layers(model, [0, 2])
    student = prune(model, plan, compensate=statistics)
    for row, layer in zip(plan.layers, layers_in(student), strict=True):
        for mine, its in zip(layer.parameters(), layers_in(model)[row.source].parameters(), strict=True):
            assert torch.equal(mine, its)


def test_moments_in_bf16_compensate_nearly_as_well(monkeypatch):
    model = tiny_model(layers=2)
    batches = [random_batch(model, batch=32, length=16, seed=seed) for seed in range(4)]
    plan = without(model, 0, "heads", 1)
    dense_output, errors = copy.deepcopy(linears_in(model)[0][0]), []
    with inputs_of([linears_in(model)[0][0]]) as seen, torch.no_grad():
        model(**batches[0])
    valid = batches[0]["attention_mask"].bool()
    x, kept = seen[0][valid], [*range(8), *range(16, 32)]
    for answer in (False, True):
        processor_with_bf16(monkeypatch, answer)
        student = prune(model, plan, collect_statistics(model, batches, loss=None))
        with torch.no_grad():
            error = linears_in(student)[0][0](x[:, kept]) - dense_output(x)
        errors.append(float(error.square().mean()))
    assert errors[1] < 1.05 * errors[0]


def test_statistics_without_moments_or_of_another_model_are_refused():
    model = tiny_model()
    batch = random_batch(model)
    plan = without(model, 0, "heads")
    with pytest.raises(InputError, match="compensate: got 'statistics without moments'"):
        prune(model, plan, collect_statistics(model, [batch], moments=False))
    other = tiny_model(intermediate=32)
    with pytest.raises(InputError, match="statistics of the model that is pruned"):
        prune(model, plan, collect_statistics(other, [batch]))
