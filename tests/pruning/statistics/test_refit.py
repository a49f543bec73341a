"""Costs of removal after compensation: against least squares on every set of columns, on small matrices and in a model."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.families import family_batch, family_model
from builders.models import tiny_model
from builders.pruning import collect, inputs_of
from builders.rounds import Counted, cutter

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.common.errors import InputError
from distill_llm.pruning.importance import score
from distill_llm.pruning.statistics.moments import RIDGE
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.refit import refit_costs, removal_costs


def least_error(x, w, gone, damping, constant=False) -> float:
    """The mean squared error over rows of x (N, C) of x w^T without columns `gone`, refitted, plus damping |change of w|^2."""
    n, c = x.shape
    kept = [j for j in range(c) if j not in gone]
    rows = np.concatenate([x / np.sqrt(n), np.sqrt(damping) * np.eye(c)])
    inputs = rows[:, kept]
    if constant:
        ones = np.concatenate([np.ones((n, 1)) / np.sqrt(n), np.zeros((c, 1))])
        inputs = np.concatenate([inputs, ones], 1)
    wanted = rows @ w.T
    found = np.linalg.lstsq(inputs, wanted, rcond=None)[0]
    return float(np.square(wanted - inputs @ found).sum())


def one_by_one(x, w, size, damping, constant=False) -> np.ndarray:
    """Costs in the order of removal: each time every unit that is left is tried together with those that are gone."""
    units = w.shape[1] // size
    columns = lambda chosen: [u * size + k for u in chosen for k in range(size)]  # noqa: E731
    costs, gone, before, least = np.zeros(units), [], 0.0, 0.0
    while len(gone) < units:
        errors = {u: least_error(x, w, columns([*gone, u]), damping, constant) for u in range(units) if u not in gone}
        chosen = min(errors, key=errors.get)
        least = costs[chosen] = max(least, errors[chosen] - before)
        before, gone = errors[chosen], [*gone, chosen]
    return costs


@pytest.fixture(scope="module")
def problem():
    draw = np.random.default_rng(0)
    x = draw.normal(size=(60, 12)) @ (draw.normal(size=(12, 12)) * np.geomspace(0.05, 1, 12)[:, None])
    return x, draw.normal(size=(5, 12))


@pytest.mark.parametrize("size", [1, 3])
def test_costs_are_those_of_least_squares_with_the_column_left_out(problem, size):
    x, w = problem
    second = torch.from_numpy(x.T @ x / len(x) + 0.02 * np.eye(12))
    weight, units = torch.from_numpy(w), 12 // size
    alone = [least_error(x, w, range(u * size, u * size + size), 0.02) for u in range(units)]
    np.testing.assert_allclose(removal_costs(weight, second, size, units), alone, rtol=1e-6)
    np.testing.assert_allclose(removal_costs(weight, second, size, 1), one_by_one(x, w, size, 0.02), rtol=1e-6)


def test_of_two_columns_that_do_the_same_one_is_cheap_and_the_other_dear(problem):
    x, w = problem
    x = np.concatenate([x, x[:, :1]], 1)
    w = np.concatenate([w, w[:, :1]], 1)
    second = torch.from_numpy(x.T @ x / len(x) + 1e-6 * np.eye(13))
    alone = removal_costs(torch.from_numpy(w), second, 1, 13)
    assert alone[0] < 1e-4 and alone[12] < 1e-4
    both = removal_costs(torch.from_numpy(w), second, 1, 1)[[0, 12]]
    assert both.min() < 1e-4 and both.max() > 0.01


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])  # with biases, without, transposed
def test_scores_of_a_model_are_what_its_linears_lose_after_compensation(family):
    model = family_model(family, **{"n_inner" if family == "gpt2" else "intermediate_size": 24})
    batch = family_batch(model, batch=6)
    statistics = refit_costs(model, collect(model, [batch], loss=None))
    found, path = score(statistics, "obs"), family_of(model)
    layer = layers_of(model)[2]
    readers = [layer.get_submodule(path.attention_out), layer.get_submodule(path.ffn_out)]
    with inputs_of(readers) as seen, torch.no_grad():
        model(**batch)
    for k, kind in enumerate(("heads", "neurons")):
        x = seen[k].reshape(*batch["attention_mask"].shape, -1)[batch["attention_mask"].bool()].double().numpy()
        weight = readers[k].weight.detach().double().numpy()
        w, bias = weight.T if family == "gpt2" else weight, readers[k].bias is not None
        damping = RIDGE * np.square(x).mean()
        expected = one_by_one(x, w, w.shape[1] // len(getattr(found, kind)[2]), damping, bias)
        np.testing.assert_allclose(getattr(found, kind)[2], expected, rtol=2e-3)
        spread = x - x.mean(0) if bias else x
        plain = (np.square(spread).mean(0) + damping) * np.square(w).sum(0)
        if kind == "neurons":
            np.testing.assert_allclose(statistics.neurons[2].removal, plain, rtol=1e-3)
    assert found.layers is found.hidden is None and len(found.queries) == 5


def test_fisher_obs_is_the_share_of_fisher_that_is_not_taken_over(tmp_path):
    model = tiny_model()
    plain = collect(model, [family_batch(model)], "kl")
    with pytest.raises(InputError, match="criterion: got 'obs'; complete the statistics with refit_costs"):
        score(plain, "obs")
    statistics = refit_costs(model, plain)
    statistics.save(tmp_path / "statistics.safetensors")
    statistics = Statistics.load(tmp_path / "statistics.safetensors")
    found = score(statistics, "fisher_obs")
    for kind in ("heads", "neurons"):
        for got, row, fisher in zip(
            getattr(found, kind), getattr(statistics, kind), getattr(score(plain, "fisher"), kind), strict=True
        ):
            torch.testing.assert_close(got, fisher * row.refit / row.removal)
            assert float((row.refit / row.removal).min()) < 0.9 and float((row.refit / row.removal).min()) > 0
    with pytest.raises(InputError, match="statistics: got 'no second moments'; collect them with CalibrationSettings"):
        refit_costs(model, replace(plain, moments=()))


def test_moments_that_are_not_finite_are_an_error_and_no_endless_loop():
    second = torch.eye(3, dtype=torch.float64)
    second[1, 1] = float("nan")
    with pytest.raises(InputError, match="statistics: got 'second moments that are not finite'"):
        removal_costs(torch.ones(2, 3, dtype=torch.float64), second, 1, 1)


def test_a_file_holds_costs_only_with_the_moments_that_they_are_of(tmp_path):
    """Another share of tokens gives other costs, and of moments that are not kept the file's record says nothing."""
    model, file = tiny_model(layers=2), tmp_path / "statistics.safetensors"
    few = {"criterion": "obs", "compensate": False, "moment_layers": 1}
    cutter(tmp_path, Counted(model), **few, moment_share=1.0).cut(model, model, 0.5, file)
    assert not Statistics.load(file).has_refit


@pytest.mark.parametrize("criterion", ["obs", "fisher_obs"])
def test_a_recipe_completes_statistics_with_or_without_compensation_and_a_few_layers_at_a_time(tmp_path, criterion):
    model, file = tiny_model(layers=4), tmp_path / "statistics.safetensors"
    options = {"criterion": criterion, "moment_share": 1.0}
    one = cutter(tmp_path, Counted(model), **options).cut(model, model, 0.5, file)
    assert Statistics.load(file).has_refit
    bare = cutter(tmp_path, Counted(model), **options, compensate=False).cut(model, model, 0.5)
    few = cutter(tmp_path, Counted(model), **options, compensate=False, moment_layers=3).cut(model, model, 0.5)
    assert one.plan == bare.plan == few.plan
    again = cutter(tmp_path, Counted(model), criterion="wanda", moment_share=1.0).cut(model, model, 0.5, file)
    assert again.plan != one.plan
