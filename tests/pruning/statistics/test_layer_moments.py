"""Second moments of a few layers at a time are those of one pass."""

from dataclasses import replace

import pytest
import torch
from builders.causal import causal_model
from builders.models import random_batch, tiny_model

from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import score
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.statistics import calibration_pass, layer_moments
from distill_llm.pruning.statistics.calibration_pass import CalibrationPass
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.layer_moments import LayerMoments
from distill_llm.pruning.statistics.settings import CalibrationSettings


def batches_of(model):
    return [random_batch(model, batch=4, length=12, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("at_once", [1, 2, 5])
@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("labels", {}),
        ("kl", {"seed": 3}),
        (None, {}),
        ("labels", {"checkpointing": True}),
        ("labels", {"precision": torch.bfloat16}),
    ],
    ids=["labels", "kl", "no loss", "checkpointing", "bf16"],
)
def test_moments_by_layer_equal_those_of_one_pass(at_once, loss, settings):
    model, settings = tiny_model(layers=3), CalibrationSettings(moment_share=0.5, **settings)
    batches, opened = batches_of(model), []
    whole = collect_statistics(model, batches, loss, settings=settings)

    def open_batches():
        opened.append(1)
        return batches

    moments = LayerMoments(CalibrationPass(model, loss, settings=settings), open_batches, at_once)
    assert len(moments) == len(whole.moments) == 3
    for mine, its in zip(moments, whole.moments, strict=True):
        for left, right in zip(mine, its, strict=True):
            torch.testing.assert_close(left.second, right.second, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(left.mean, right.mean, rtol=1e-5, atol=1e-6)
    assert len(opened) == -(-3 // at_once) and len(moments._held) <= at_once
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_sums_of_two_processes_are_those_of_one(monkeypatch):
    model, parts = tiny_model(layers=3), []
    calibration = CalibrationPass(model, settings=CalibrationSettings(moment_share=1.0, sharded=True))
    batches = batches_of(model)
    whole = collect_statistics(model, batches, settings=CalibrationSettings(moment_share=1.0)).moments[1]
    for rank in (0, 1):
        monkeypatch.setattr(calibration_pass, "process", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(layer_moments, "sum_over_processes", lambda sums: parts.append([s.clone() for s in sums]))
        LayerMoments(calibration, lambda: batches, 1)[1]

    def both(sums):
        for mine, one, other in zip(sums, *parts, strict=True):
            mine.copy_(one + other)

    monkeypatch.setattr(layer_moments, "sum_over_processes", both)
    found = LayerMoments(calibration, lambda: batches, 1)[1]
    for mine, its in zip(found, whole, strict=True):
        torch.testing.assert_close(mine.second, its.second, rtol=1e-5, atol=1e-6)


def test_a_model_pruned_with_moments_by_layer_is_the_one_of_one_pass():
    model = causal_model(num_hidden_layers=3)
    batches = batches_of(model)
    whole = collect_statistics(model, batches, "kl")
    plan = plan_pruning(model, score(whole, "fisher"), 0.6)
    few = replace(whole, moments=LayerMoments(CalibrationPass(model, "kl"), lambda: batches, 1))
    for one, other in zip(prune(model, plan, whole).parameters(), prune(model, plan, few).parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
