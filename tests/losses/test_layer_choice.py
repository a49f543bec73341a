"""Layers matched by their states: against enumeration of all matchings, and loops over tokens."""

import itertools

import numpy as np
import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.trainers import NO_DROPOUT, rows, trainer_of

from distill_llm.common.errors import InputError
from distill_llm.losses.adapters import interpolated
from distill_llm.losses.layer_choice import nearest, spread
from distill_llm.losses.mapping import hidden_pairs
from distill_llm.losses.matching import Match, MatchSettings
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.signals import Batch, Signals
from distill_llm.losses.terms.term import Use


@pytest.mark.parametrize("count, columns", [(1, 1), (1, 4), (4, 1), (2, 5), (5, 2), (4, 4), (3, 6)])
def test_the_ordered_matching_is_the_best_of_all_that_keep_the_order(count, columns):
    for seed in range(30):
        costs = torch.rand(count, columns, generator=torch.Generator().manual_seed(seed))
        every = itertools.product(range(columns), repeat=count)
        in_order = [each for each in every if list(each) == sorted(each)]
        total = lambda choice, costs=costs: sum(float(costs[row, column]) for row, column in enumerate(choice))  # noqa: E731
        assert tuple(nearest(costs, ordered=True).tolist()) == min(in_order, key=total)
        free = min(itertools.product(range(columns), repeat=count), key=total)
        assert tuple(nearest(costs, ordered=False).tolist()) == free


@pytest.mark.parametrize("student, teacher", [(2, 6), (3, 3), (4, 6), (6, 4)])
def test_it_begins_as_uniform_does(student, teacher):
    assert spread(student, teacher) == [pair.teacher for pair in hidden_pairs("uniform", student, teacher, None)]


def distance(name, a, b):
    if name == "mse":
        return ((a - b) ** 2).mean(-1)
    return 1 - (a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))


def of_models(steps=3, **settings):
    """By step: the value of the term, and the states of both models by layer in float64; and the mask."""
    models = tiny_model(layers=3, hidden=16), tiny_model(layers=5, hidden=16, seed=1)
    (term,) = parse_objective({"hidden": settings}).terms().values()
    match = Match(*models, MatchSettings())
    pairs = term.layer_pairs(match)
    if (memory := term.memory(match, pairs)) is not None:
        match.memories["hidden"] = memory
    for seed in range(steps):
        batch = random_batch(models[0], seed=seed)
        with torch.no_grad():
            states = [model(**batch, output_hidden_states=True).hidden_states[1:] for model in models]
        states = [
            [each + torch.randn(16, generator=torch.Generator().manual_seed(seed)) for each in own] for own in states
        ]
        signals = [Signals(dict(enumerate(own)), logits=torch.zeros(4, 2)) for own in states]
        made = Batch(signals[1], None, batch["attention_mask"], student=signals[0])
        value = float(term.sum(made, match, pairs))
        if memory is not None:
            memory.end_step()
        yield value, [[each.double().numpy() for each in own] for own in states], batch["attention_mask"].bool().numpy()


@pytest.mark.parametrize("name", ["mse", "cosine"])
@pytest.mark.parametrize(
    "each, ordered", [("student", False), ("student", True), ("teacher", False), ("teacher", True)]
)
def test_a_step_compares_the_layers_that_were_nearest_in_the_step_before(name, each, ordered):
    columns = [0, 2, 3, 4]
    matching = {"each": each, "ordered": ordered, "teacher": columns}
    choice, seen = None, set()
    for value, (own, source), valid in of_models(layers="nearest", distance=name, matching=matching):
        tokens = [[distance(name, own[s][valid], source[t][valid]) for t in columns] for s in range(3)]
        costs = np.array([[cell.sum() for cell in row] for row in tokens])
        costs = costs.T if each == "teacher" else costs
        count = len(costs)
        if choice is None:
            choice = [-(-(row + 1) * len(costs[0]) // count) - 1 for row in range(count)]
        expected = sum(costs[row, column] for row, column in enumerate(choice)) / count
        assert value == pytest.approx(expected, rel=1e-4)
        choices = itertools.product(range(len(costs[0])), repeat=count)
        kept = [found for found in choices if not ordered or list(found) == sorted(found)]
        choice = min(kept, key=lambda found, costs=costs: sum(costs[row, column] for row, column in enumerate(found)))
        seen.add(tuple(choice))
    assert seen != {tuple(spread(3, 4))}


@pytest.mark.parametrize("form", ["states", "distances"])
@pytest.mark.parametrize("pool", ["mean", "first"])
def test_attention_over_layers_is_a_softmax_over_cosines_of_pooled_states(form, pool):
    matching = {"form": form, "pool": pool, "temperature": 0.3, "teacher": [1, 3, 4]}
    ((value, (own, source), valid),) = of_models(1, layers="attention", matching=matching)
    expected = 0.0
    for row, mask in enumerate(valid):
        pools = [
            [each[row][mask].mean(0) if pool == "mean" else each[row][mask][0] for each in side]
            for side in (own, source)
        ]
        for s in range(3):
            scores = np.array([1 - distance("cosine", pools[0][s], pools[1][t]) for t in (1, 3, 4)]) / 0.3
            shares = np.exp(scores) / np.exp(scores).sum()
            if form == "states":
                mixture = sum(share * source[t][row][mask] for share, t in zip(shares, (1, 3, 4), strict=True))
                expected += distance("mse", own[s][row][mask], mixture).sum() / 3
            else:
                parts = [distance("mse", own[s][row][mask], source[t][row][mask]).sum() for t in (1, 3, 4)]
                expected += (shares * parts).sum() / 3
    assert value == pytest.approx(expected, rel=1e-4)


def test_interpolation_reads_channels_as_points_on_a_line():
    states = torch.randn(2, 3, 5)
    for width in (2, 5, 9, 12):
        found = interpolated(states, width)
        expected = [np.interp(np.linspace(0, 4, width), np.arange(5), row) for row in states.reshape(-1, 5).numpy()]
        np.testing.assert_allclose(found.reshape(-1, width).numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{"layers": "nearest", "matching": {"ordered": True}}, {"layers": "attention"}], ids=str
)
def test_states_of_other_widths_share_one_projection_and_a_resume_goes_on_with_the_matching(tmp_path, settings):
    teacher, data = tiny_model(layers=4, **NO_DROPOUT), rows(tiny_model(), count=20)
    runs, options = {}, {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 4}
    for name, start in (("whole", None), ("again", "checkpoint-3")):
        student = tiny_model(layers=2, hidden=24, seed=1, **NO_DROPOUT)
        losses = {"hidden": settings, "channels": {}, "embeddings": {"adapter": "interpolation"}}
        trainer = trainer_of(tmp_path / name, student, teacher, data, losses, **options)
        assert list(trainer.terms.projections) == ["1-3", "shared"]
        trainer.train(resume_from_checkpoint=None if start is None else str(tmp_path / "whole" / start))
        runs[name] = {
            **student.state_dict(),
            **trainer.terms.projections.state_dict(),
            **trainer.terms.memories.state_dict(),
        }
    assert all(torch.equal(each, runs["again"][name]) for name, each in runs["whole"].items())
    assert ("hidden.choice" in runs["whole"]) == (settings["layers"] == "nearest")


@pytest.mark.slow
def test_two_micro_batches_choose_as_one_batch_does(tmp_path):
    teacher, data, found = tiny_model(layers=4, **NO_DROPOUT), rows(tiny_model(), count=24), []
    for size in (8, 4):
        student = tiny_model(layers=2, seed=1, **NO_DROPOUT)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "max_steps": 3}
        losses = {"hidden": {"layers": "nearest", "matching": {"each": "teacher"}}}
        trainer = trainer_of(tmp_path, student, teacher, data, losses, optim="sgd", **sizes)
        trainer.train()
        found.append({**student.state_dict(), **trainer.terms.memories.state_dict()})
    for name, each in found[0].items():
        torch.testing.assert_close(found[1][name], each, rtol=1e-4, atol=1e-6, msg=name)
    assert found[0]["hidden.costs"].min() > 0


@pytest.mark.parametrize(
    "settings, use, field",
    [
        ({"layers": "uniform", "matching": {}}, Use(), "matching"),
        ({"layers": "nearest", "matching": {"temperature": 1.0}}, Use(), "matching.temperature"),
        ({"layers": "attention", "matching": {"ordered": True}}, Use(), "matching.ordered"),
        ({"layers": "nearest", "matching": {"teacher": [0, 9]}}, Use(layers=(2, 6)), "matching.teacher"),
        ({"layers": "nearest", "matching": {"teacher": [1, 1]}}, Use(), "matching.teacher"),
        ({"layers": "attention"}, Use(packed="data.packing"), "layers"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, use, field):
    (fault,) = parse_objective({"hidden": settings}).faults(use)
    assert fault.field == f"losses.hidden.{field}" and "\n" not in str(fault) and len(str(fault)) <= 300


def test_other_terms_take_fixed_layers_alone():
    for name in ("attention", "relations", "neurons", "flow"):
        with pytest.raises(InputError, match=f"losses.{name}.layers"):
            parse_objective({name: {"layers": "nearest"}})
