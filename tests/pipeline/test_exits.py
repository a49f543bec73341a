"""Runs with exits: from a recipe to a student whose rows leave early, its report, and the same bits after a stop."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from builders.models import tiny_model
from builders.recipes import faults_at_the_door, recipe_for, recipe_with, write_model
from builders.runs import same, weights, write_learnable_rows
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import distill_llm
from distill_llm import with_exits
from distill_llm.architectures.modeling_exits import has_exits
from distill_llm.common.errors import InputError
from distill_llm.losses.objective import parse_objective
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pipeline.stages import recover
from distill_llm.recipe.recipe import parse_recipe

TRAINING = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-3, "use_cpu": True, "save_steps": 2}
LOSSES = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}


@pytest.fixture
def given(tmp_path):
    write_model(tmp_path / "teacher", layers=4, max_position_embeddings=64)
    write_learnable_rows(tmp_path / "rows.csv", rows=80)
    recipe = recipe_for(tmp_path, exits=[1, 3], distillation={"losses": LOSSES, **TRAINING})
    recipe["data"]["holdout_examples"] = 16
    recipe["report"] = {"latency_grid": False, "examples": 0}
    return recipe


@pytest.mark.slow
def test_a_recipe_gives_a_pruned_student_with_exits_and_a_curve_and_a_stopped_run_ends_with_the_same_bits(
    given, tmp_path, monkeypatch, capsys
):
    given["pruning"] |= {"rounds": 2}
    result = distill_llm.run(given, tmp_path / "run")
    found = result.metrics["exits"]
    assert found["after"] == [1, 3] and found["layers"] == 4 and found["held_out"]["rows"] == 16
    curve = found["curve"]
    assert curve[0]["threshold"] is None and curve[0]["speedup"] == 1 and curve[0]["left"] == [0, 0, 1]
    assert curve[0]["score"] == pytest.approx(result.metrics["student"]["score"])
    assert [point["layers"] for point in curve] == sorted((point["layers"] for point in curve), reverse=True)
    assert all(point["latency_ms"] > 0 and sum(point["left"]) == pytest.approx(1) for point in curve)
    if found["threshold"] is not None:
        assert (
            found["held_out"]["score"] >= found["whole_held_out"]["score"] - found["whole_held_out"]["standard_error"]
        )
        assert sum(point["threshold"] == found["threshold"] for point in curve) == 1

    folder = tmp_path / "run" / "student"
    student = load_pretrained(folder)
    assert has_exits(student) and student.config.exits == {"after": [1, 3], "threshold": found["threshold"]}
    assert student.exit_threshold is None and "Pruned" in type(student).__name__
    assert not has_exits(load_pretrained(tmp_path / "run" / "round-1" / "student"))  # it is pruned once more
    for text in ((tmp_path / "run" / "report.md").read_text(), (tmp_path / "run" / "report.html").read_text()):
        assert "Early exits" in text and "all layers" in text
    assert (tmp_path / "run" / "figures" / "exits.png").stat().st_size > 1000
    history = result.metrics["history"]
    assert (
        "loss/exits" in history["round-2/recover"]["losses"]
        and "loss/exits" not in history["round-1/recover"]["losses"]
    )

    inputs = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(
        ["the good film", "bad plot"], return_tensors="pt", padding=True
    )
    elsewhere = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        for threshold in (None, 0.55, 0.0):
            assert torch.equal(
                elsewhere(**inputs, exit_threshold=threshold).logits, student(**inputs, exit_threshold=threshold).logits
            )

    stopped = tmp_path / "stopped"
    train, calls = recover.train_model, []

    def stops_in_the_last_round(run, model, *rest):
        calls.append(model)
        if has_exits(model):
            saves = type(model).save_pretrained

            def save_and_stop(self, *args, **kwargs):
                saves(self, *args, **kwargs)
                if len(list(stopped.glob("round-2/student-training/checkpoint-*"))) == 2:
                    raise KeyboardInterrupt

            monkeypatch.setattr(type(model), "save_pretrained", save_and_stop)
        return train(run, model, *rest)

    monkeypatch.setattr(recover, "train_model", stops_in_the_last_round)
    with pytest.raises(KeyboardInterrupt):
        distill_llm.run(given, stopped)
    monkeypatch.undo()
    assert len(calls) == 2 and list(stopped.glob("round-2/student-training/checkpoint-*"))
    again = distill_llm.run(given, stopped)
    assert same(weights(folder), weights(stopped / "student"))
    assert again.metrics["exits"]["threshold"] == found["threshold"]
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert "exits" in state["stages"]


@pytest.mark.slow
def test_the_door_refuses_what_exits_do_not_go_with_in_one_line_each(tmp_path):
    write_model(tmp_path / "teacher", layers=4, max_position_embeddings=64)
    write_learnable_rows(tmp_path / "rows.csv")
    held = {"exits": [1, 3], "data__holdout_examples": 8}
    assert faults_at_the_door(recipe_with(tmp_path, **held)) == []
    cases = [
        ({"data__holdout_examples": 0}, "exits.threshold: got 'auto'; set data.holdout_examples"),
        ({"exits": [1, 4]}, "exits.after: got [1, 4]; accepted: numbers of layers from 1 to 3"),
        ({"pruning__units": ["heads", "layers"]}, "pruning.units: got ['heads', 'layers']; remove layers from it"),
        (
            {"pruning": {"layers": [0, 1, 3]}, "exits": [1, 3]},
            "exits.after: got [1, 3]; accepted: numbers of layers from 1 to 2",
        ),
    ]
    for changes, message in cases:
        (fault,) = faults_at_the_door(recipe_with(tmp_path, **{**held, **changes}))
        assert fault.startswith(message) and len(fault) <= 300, fault
    write_model(tmp_path / "teacher", family="mpnet", layers=4)
    (fault,) = faults_at_the_door(recipe_with(tmp_path, **held))
    assert fault.startswith(
        "exits: got 'MPNetForSequenceClassification'; accepted: a ...ForSequenceClassification model"
    )
    with_exits(tiny_model(layers=4, vocab=12), [1]).save_pretrained(write_model(tmp_path / "teacher", layers=4))
    (fault,) = faults_at_the_door(recipe_with(tmp_path))
    assert fault.startswith("teacher.model: got ") and "with exits'; prune the model that it was made from" in fault


@pytest.mark.slow
def test_sections_that_do_not_go_together_are_refused_and_the_loss_is_added():
    plain = {"teacher": {"model": "x"}, "data": {"task": "sst2"}, "pruning": {"keep": 0.5}}
    read = parse_recipe({**plain, "exits": [3, 6], "distillation": {}})
    assert read.exits.after == [3, 6] and list(read.distillation.losses.terms()) == ["labels", "exits", "logits"]
    assert parse_recipe(yaml.safe_load(read.to_yaml())) == read
    assert "exits" not in parse_recipe({**plain, "distillation": {}}).distillation.losses.terms()
    only = {"losses": {"exits": {}}}
    cases = [
        ({"exits": [3]}, "exits: got [3]; remove it, or add a distillation section"),
        ({"distillation": {"losses": {"labels": {}, "exits": {}}}}, "distillation.losses.exits: got "),
        ({"exits": [3], "distillation": only}, "distillation.losses: got 'exits alone'; add labels or logits"),
        (
            {"exits": [3], "distillation": {}, "student": {"peft": {"r": 4}}},
            "student.peft: got {'r': 4}; remove it, or remove exits",
        ),
        (
            {"exits": {"after": [3], "threshold": 1.0}, "distillation": {}},
            "exits.threshold: got 1.0; accepted: auto, or",
        ),
        (
            {"exits": {"after": [3], "threshold": "x"}, "distillation": {}},
            "exits.threshold: got 'x'; accepted: auto, or",
        ),
        (
            {"teacher": {"model": "x", "moving_average": {}}, "exits": [3], "distillation": {}},
            "teacher.moving_average: got 'a section'; remove it, or remove exits",
        ),
        ({"exits": [], "distillation": {}}, "exits.after: got []"),
        ({"exits": 3, "distillation": {}}, "exits: got 3; accepted: a mapping with after"),
    ]
    for changes, message in cases:
        with pytest.raises(InputError) as error:
            parse_recipe({**plain, **changes})
        assert message in str(error.value), error.value


def test_the_recipe_of_the_page_is_read():
    page = (Path(__file__).parents[2] / "docs" / "methods" / "exits.md").read_text()
    recipe = parse_recipe(yaml.safe_load(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1]))
    assert recipe.exits.after == [3, 6, 9] and recipe.exits.within == 1
    assert recipe.distillation.losses.exits == parse_objective({"exits": {}}).exits
