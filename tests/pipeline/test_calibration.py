"""A round's calibration: what is measured, and what is read again from a file."""

import pytest
import torch
from builders.grids import slow
from builders.models import tiny_model
from builders.pruning import collect
from builders.rounds import Counted, cutter
from safetensors.torch import load

from distill_llm.common.errors import InputError
from distill_llm.common.locks import held
from distill_llm.pipeline import calibration as calibrating
from distill_llm.pruning.importance import score
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.record import Statistics


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=4)


def test_channels_are_measured_where_a_file_keeps_them_or_they_may_go(model, tmp_path):
    file = tmp_path / "statistics.safetensors"
    for units, given, count in ((["heads"], None, 0), (["heads"], file, 32), (["hidden"], None, 32)):
        found = cutter(tmp_path, Counted(model), units=units).calibration.statistics(model, 0, given)
        assert len(found.hidden.fisher) == count


def test_the_recipe_says_how_statistics_are_measured(model, tmp_path, monkeypatch):
    file, asked = tmp_path / "statistics.safetensors", []
    options = {"precision": "bfloat16", "moment_share": 0.5, "checkpointing": True}
    collect = lambda *args, settings: asked.append(settings) or collect_statistics(*args, settings=settings)  # noqa: E731
    monkeypatch.setattr(calibrating, "collect_statistics", collect)
    cutter(tmp_path, Counted(model), **options).cut(model, model, 0.5, file)
    assert {name: getattr(asked[0], name) for name in options} == {**options, "precision": torch.bfloat16}
    cutter(tmp_path, Counted(model), **options).cut(model, model, 0.3, file)
    assert len(asked) == 1
    cutter(tmp_path, Counted(model)).cut(model, model, 0.5, file)
    assert len(asked) == 2, "what was measured otherwise is measured anew"


@pytest.mark.parametrize("criterion", ["fisher", "activation"])
def test_moments_of_a_few_layers_at_a_time_give_the_same_cut(model, tmp_path, criterion, monkeypatch):
    file, batches, few = tmp_path / "statistics.safetensors", Counted(model), Counted(model)
    whole = cutter(tmp_path, batches, criterion=criterion).cut(model, model, 0.5)
    found = cutter(tmp_path, few, criterion=criterion, moment_layers=2).cut(model, model, 0.5, file)
    assert found.plan == whole.plan and Statistics.load(file).moments == ()
    for one, other in zip(found.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(calibrating, "collect_statistics", None)
    assert cutter(tmp_path, few, criterion=criterion, moment_layers=4).cut(model, model, 0.3, file).kept <= 0.3


def test_another_budget_or_criterion_reads_the_file_and_no_data(model, tmp_path, monkeypatch):
    file = tmp_path / "statistics.safetensors"
    cutter(tmp_path, Counted(model)).cut(model, model, 0.5, file)
    fresh = cutter(tmp_path, Counted(model), criterion="wanda").cut(model, model, 0.3)
    monkeypatch.setattr(calibrating, "collect_statistics", None)
    for pruning in (
        {"criterion": "wanda"},
        {"criterion": "magnitude"},
        {"units": ["hidden", "neurons"], "compensate": False},
        {"compensate": False},
    ):
        again = cutter(tmp_path, Counted(model), **pruning).cut(model, model, 0.3, file)
        assert again.kept <= 0.3
        if pruning == {"criterion": "wanda"}:
            assert again.plan == fresh.plan
    blocks = cutter(tmp_path, Counted(model), criterion="block_influence", units=["layers"])
    assert len(blocks.cut(model, model, 0.5, file).plan.layers) == 2


def test_a_users_file_serves_every_later_criterion(model, tmp_path, monkeypatch):
    """Gradients too, which the first criterion does not read; the file of a round's own folder has no more than it needs."""
    kept, own = tmp_path / "kept.safetensors", tmp_path / "own.safetensors"
    cutter(tmp_path, Counted(model), criterion="activation", statistics=str(kept)).cut(model, model, 0.5, kept)
    cutter(tmp_path, Counted(model), criterion="activation", statistics=str(kept)).cut(model, model, 0.5, own)
    assert not Statistics.load(own).has_gradients
    fresh = cutter(tmp_path, Counted(model)).cut(model, model, 0.4)
    monkeypatch.setattr(calibrating, "collect_statistics", None)
    for criterion in ("fisher", "taylor", "wanda", "magnitude"):
        batches = Counted(model)
        again = cutter(tmp_path, batches, criterion=criterion, statistics=str(kept)).cut(model, model, 0.4, kept)
        if criterion == "fisher":
            assert again.plan.layers == fresh.plan.layers
    with pytest.raises(TypeError, match="NoneType"):  # gradients of another loss are collected anew
        cutter(tmp_path, Counted(model), loss="kl", statistics=str(kept)).cut(model, model, 0.4, kept)


def test_a_file_keeps_what_the_first_of_several_cuts_measured(model, tmp_path, monkeypatch):
    file = tmp_path / "statistics.safetensors"
    cutter(tmp_path, Counted(model), cuts=3).cut(model, model, 0.5, file)
    monkeypatch.setattr(calibrating, "collect_statistics", None)
    assert cutter(tmp_path, Counted(model)).cut(model, model, 0.3, file).kept == pytest.approx(0.3, rel=0.01)


@pytest.mark.slow
def test_statistics_of_another_model_other_rows_or_less_are_measured_anew(model, tmp_path):
    file = tmp_path / "statistics.safetensors"

    def measured(given, **pruning) -> bool:
        mine = given if isinstance(given, Counted) else Counted(given)
        before = file.stat().st_mtime_ns if file.is_file() else 0
        cutter(tmp_path, mine, **pruning).cut(model if given is mine else given, model, 0.5, file)
        return file.stat().st_mtime_ns != before

    assert measured(model, criterion="magnitude", compensate=False)
    assert not measured(model, criterion="activation", compensate=False)
    assert measured(model, compensate=False), "gradients are needed"
    assert measured(model), "moments are needed"
    assert not measured(model)
    assert measured(model, loss="kl"), "gradients of another loss"
    assert measured(model)
    assert measured(tiny_model(layers=4, seed=1)), "another model"
    assert measured(Counted(model, count=2)), "other rows"
    (tmp_path / "statistics.json").unlink()
    assert measured(Counted(model, count=2)), "a file that nobody knows"


def test_statistics_of_another_precision_are_measured_anew(tmp_path):
    """The same weights and rows, under autocast or in another dtype, have other statistics."""
    file, model = tmp_path / "statistics.safetensors", tiny_model(layers=4)

    def measured(given, **pruning) -> bool:
        before = file.stat().st_mtime_ns if file.is_file() else 0
        cutter(tmp_path, Counted(model), compensate=False, **pruning).cut(given, given, 0.5, file)
        return file.stat().st_mtime_ns != before

    assert measured(model) and not measured(model)
    assert measured(model, precision="bfloat16"), "autocast"
    assert not measured(model, precision="bfloat16")
    half = tiny_model(layers=4).to(torch.bfloat16)
    assert measured(half, precision="bfloat16"), "weights of another dtype"
    assert measured(half) and not measured(half)
    found = Statistics.load(file)
    assert torch.equal(found.neurons[0].fisher, collect(half, Counted(model), seed=0).neurons[0].fisher)
    assert measured(half.float()), "rounded weights, held in the first dtype"


def test_leave_one_out_completes_statistics_that_are_there(model, tmp_path, monkeypatch):
    file, options = tmp_path / "statistics.safetensors", {"criterion": "leave_one_out", "units": ["layers"]}
    cutter(tmp_path, Counted(model)).cut(model, model, 0.5, file)
    monkeypatch.setattr(calibrating, "collect_statistics", None)
    plan = cutter(tmp_path, Counted(model), **options).cut(model, model, 0.5, file).plan
    without = Statistics.load(file).without
    assert {row.source for row in plan.layers} == set(without.topk(2).indices.tolist())
    monkeypatch.setattr(calibrating, "leave_one_out", None)
    assert cutter(tmp_path, Counted(model), **options).cut(model, model, 0.5, file).plan == plan
    assert Statistics.load(file).has_gradients


def test_without_labels_gradients_are_of_the_models_own_predictions(model, tmp_path):
    batches = Counted(model, labels=False)
    found = cutter(tmp_path, batches).cut(model, model, 0.5)
    plan = plan_pruning(model, score(collect_statistics(model, batches.batches, "kl")), 0.5)
    assert found.plan.layers == plan.layers
    assert cutter(tmp_path, Counted(model)).calibration.loss == "labels"
    assert cutter(tmp_path, Counted(model), loss="kl").calibration.loss == "kl"


@pytest.mark.parametrize("name", ["statistics.safetensors", *slow("statistics.json")])
def test_damaged_statistics_are_measured_anew(model, tmp_path, name):
    file = tmp_path / "statistics.safetensors"
    cutter(tmp_path, Counted(model), compensate=False).cut(model, model, 0.5, file)
    whole, tensors = (tmp_path / name).read_bytes(), load(file.read_bytes())
    flipped = bytearray(whole)
    flipped[len(flipped) - 20] ^= 1  # a value of the last tensor; a letter of the hash
    for wrong in (b"", bytes(flipped)):
        (tmp_path / name).write_bytes(wrong)
        cutter(tmp_path, Counted(model), compensate=False).cut(model, model, 0.5, file)
        found = load(file.read_bytes())  # not mapped, since the file is written over
        assert found.keys() == tensors.keys() and all(torch.equal(found[key], tensors[key]) for key in tensors)
        assert (tmp_path / name).read_bytes() != wrong


def test_a_run_waits_for_another_that_uses_the_same_statistics(model, tmp_path, monkeypatch):
    file = tmp_path / "statistics.safetensors"
    monkeypatch.setattr(calibrating, "LONGEST_WAIT", 0)
    lock, line = tmp_path / ".statistics.safetensors.lock", "^pruning.statistics: got .*; wait until it ends"
    with held(lock, "x", file), pytest.raises(InputError, match=line):
        cutter(tmp_path, Counted(model)).cut(model, model, 0.5, file)
    cutter(tmp_path, Counted(model)).cut(model, model, 0.5, file)
    assert sorted(path.name for path in tmp_path.glob("*stat*")) == ["statistics.json", "statistics.safetensors"]
