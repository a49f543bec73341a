"""SparseGPT's update against least squares, solved row by row without it."""

import pytest
import torch
from builders.families import family_model
from builders.models import random_batch, tiny_model

from distill_llm.models.masks import linears_of
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.weights.rules import SparsityRules
from distill_llm.pruning.weights.sparsegpt import choose_groups, choose_share, sparsegpt
from distill_llm.pruning.weights.sparsify import sparsify


def problem(outputs=5, inputs=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)  # features that depend on each other
    return torch.randn(outputs, inputs, generator=generator, dtype=torch.float64), x.T @ x / len(x)


def damped(second, damping=0.01):
    return second + damping * second.diagonal().mean() * torch.eye(len(second), dtype=second.dtype)


def column_by_column(weight, second, gone):
    """After each column is fixed, those after it are solved for anew: the least (w - w0) H (w - w0)^T with what is fixed."""
    found = weight.clone()
    for row, goes, dense in zip(found, gone, weight, strict=True):
        for j in range(len(row)):
            row[j] = 0.0 if goes[j] else row[j]
            rest = slice(j + 1, None)
            fixed = row[: j + 1] - dense[: j + 1]
            if len(dense[rest]):
                row[rest] = dense[rest] - torch.linalg.solve(second[rest, rest], second[rest, : j + 1] @ fixed)
    return found


@pytest.mark.parametrize("block", [12, 5, 1])
def test_given_masks_the_update_solves_least_squares_column_by_column(block):
    weight, second = problem()
    gone = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    new, chosen = sparsegpt(weight, second, lambda costs, begin: gone[:, begin : begin + costs.shape[1]], block=block)
    assert torch.equal(chosen, gone) and not new[gone].any()
    torch.testing.assert_close(new, column_by_column(weight, damped(second), gone))


def test_of_first_columns_that_go_the_update_is_the_least_squares_solution_of_each_row():
    weight, second = problem()
    gone = torch.zeros(weight.shape, dtype=torch.bool)
    for row, count in enumerate((0, 3, 5, 7, 11)):
        gone[row, :count] = True
    new, _ = sparsegpt(weight, second, lambda costs, begin: gone, damping=1e-12)
    for row, goes, dense in zip(new, gone, weight, strict=True):
        solved = torch.linalg.solve(second[~goes][:, ~goes], second[~goes] @ dense)
        torch.testing.assert_close(row[~goes], solved, rtol=1e-6, atol=1e-8)


def test_the_cost_of_a_weight_is_the_error_of_the_best_repair_without_it():
    weight, second = problem()
    seen = []
    sparsegpt(weight, second, lambda costs, begin: seen.append(costs.clone()) or costs < 0)
    full = damped(second)
    inverse = torch.linalg.inv(full)
    # Of the first column all others repair: the error of least squares with that weight at 0.
    for row, cost in zip(weight, seen[0][:, 0], strict=True):
        change = row[0] / inverse[0, 0] * inverse[0]
        assert cost == pytest.approx((change @ full @ change).item())


def error(new, weight, second):
    return ((new - weight) @ second * (new - weight)).sum()


@pytest.mark.parametrize("share", [0.5, 0.37])
def test_numbers_are_exact_over_blocks_and_the_error_is_below_that_of_masks_alone(share):
    weight, second = problem(16, 24)
    new, gone = sparsegpt(weight, second, choose_share(share, weight.shape), block=7)
    assert gone.sum() == round(share * weight.numel())
    by_size = weight.masked_fill(weight.abs() <= weight.abs().flatten().sort().values[gone.sum() - 1], 0.0)
    assert error(new, weight, second) < 0.8 * error(weight.masked_fill(gone, 0.0), weight, second)
    assert error(new, weight, second) < 0.8 * error(by_size, weight, second)


def test_groups_are_chosen_by_what_the_columns_before_have_passed_on():
    weight, second = problem(16, 24)
    new, gone = sparsegpt(weight, second, choose_groups(2, 4), block=8, every=4)
    assert (gone.view(16, 6, 4).sum(-1) == 2).all() and not new[gone].any()
    again, same = sparsegpt(weight, second, choose_groups(2, 4), block=4)
    assert torch.equal(gone, same)
    torch.testing.assert_close(new, again)


def test_a_feature_that_is_always_zero_takes_nothing_and_weights_that_must_go_do():
    weight, second = problem()
    second[3], second[:, 3] = 0.0, 0.0
    must = torch.zeros(weight.shape, dtype=torch.bool)
    must[:, 7] = True
    new, gone = sparsegpt(weight, second, choose_share(0.4, weight.shape), gone=must)
    assert gone[:, 7].all() and not new[:, 3].any() and new.isfinite().all()


def test_repairs_are_the_same_of_inputs_of_any_size_beside_a_feature_that_is_always_zero():
    weight, second = problem()
    second[3], second[:, 3] = 0.0, 0.0
    wanted, gone = sparsegpt(weight, second, choose_share(0.5, weight.shape))
    found, same = sparsegpt(weight, second * 2**-30, choose_share(0.5, weight.shape))
    assert torch.equal(gone, same)
    torch.testing.assert_close(found, wanted)
    alive = [i for i in range(12) if i != 3]
    (alone, _) = sparsegpt(weight[:, alive], second[alive][:, alive], lambda costs, begin: gone[:, alive])
    torch.testing.assert_close(found[:, alive], alone)


def test_where_no_feature_is_ever_seen_all_weights_are_zero():
    weight = problem()[0]
    new, gone = sparsegpt(weight, torch.zeros(12, 12), choose_share(0.5, weight.shape))
    assert not new.any() and gone.sum() == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, pattern", [("llama", "unstructured"), ("llama", "2:4"), ("gpt2", "2:4"), ("opt", "4:8")]
)
def test_outputs_of_a_sparse_model_are_nearer_with_the_update(family, pattern):
    model = family_model(family)
    batches = [random_batch(model, batch=8, length=16, labels=False, seed=seed) for seed in range(4)]
    error, wanted = {}, None
    for criterion in ("magnitude", "sparsegpt"):
        rules = SparsityRules(0.5 if pattern == "unstructured" else None, pattern, criterion)
        sparse, masks = sparsify(model, batches, rules)
        assert masks.sparsity == 0.5 and all(
            mask.shape == linears_of(model)[n].weight.shape for n, mask in masks.kept.items()
        )
        if pattern != "unstructured":
            size = int(pattern[-1])
            for name, mask in masks.kept.items():
                rows = mask.T if family == "gpt2" else mask
                assert (rows.reshape(-1, size).sum(1) == size // 2).all(), name
        with torch.no_grad():
            found = torch.cat([sparse(**batch).logits[batch["attention_mask"].bool()] for batch in batches])
            wanted = torch.cat([model(**batch).logits[batch["attention_mask"].bool()] for batch in batches])
        error[criterion] = (found - wanted).square().mean()
    assert error["sparsegpt"] < 0.8 * error["magnitude"]


@pytest.mark.slow
def test_layers_at_a_time_see_the_inputs_of_sparse_ones_before_them():
    model = tiny_model(layers=3)
    batches = [random_batch(model, seed=seed) for seed in range(3)]
    rules, exact = SparsityRules(0.5, criterion="sparsegpt"), CalibrationSettings(exact=True)
    found, _ = sparsify(model, batches, rules, layers_at_once=1, settings=exact)
    by_hand = model
    for layer in range(3):
        whole, masks = sparsify(by_hand, batches, rules, settings=exact)
        by_hand_next = sparsify(by_hand, rules=SparsityRules(1e-9, criterion="magnitude"))[0]
        names = [name for name in masks.kept if f"layer.{layer}." in name]
        with torch.no_grad():
            for name in names:
                by_hand_next.get_submodule(name).weight.copy_(whole.get_submodule(name).weight)
        by_hand = by_hand_next
    for name, module in linears_of(by_hand).items():
        torch.testing.assert_close(linears_of(found)[name].weight, module.weight, rtol=1e-4, atol=1e-5, msg=name)
