"""Runs with several teachers: weights learnt on held-out rows, one teacher in memory at a time, one cache of all."""

import copy
import json

import pytest
import torch
from builders.recipes import faults_at_the_door, recipe_for, write_model
from builders.runs import same, weights, write_learnable_rows
from typer.testing import CliRunner

import distill_llm
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.pipeline.stages import ensemble as stage
from distill_llm.pipeline.stages import recover
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.teachers.cache_format import read_index

TRAINING = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-3, "use_cpu": True}
NAMES = {"id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}


@pytest.fixture
def given(tmp_path):
    """A recipe with a teacher and two more, and held-out rows."""
    for seed, name in enumerate(("teacher", "second", "third")):
        write_model(tmp_path / name, seed=seed, max_position_embeddings=64, **NAMES)
        model = load_pretrained(tmp_path / name)  # of a mind of its own, so that a mean is better than each
        with torch.no_grad():
            model.classifier.weight.mul_(20)
        model.save_pretrained(tmp_path / name)
    write_learnable_rows(tmp_path / "rows.csv", rows=80)
    others = [{"model": str(tmp_path / name)} for name in ("second", "third")]
    recipe = recipe_for(tmp_path, distillation={"losses": {"logits": {}}, **TRAINING})
    recipe["data"]["holdout_examples"] = 24
    recipe["teacher"]["ensemble"] = {"others": others}
    return recipe


def changed(recipe, **ensemble):
    recipe = copy.deepcopy(recipe)
    teacher = {**recipe["teacher"], "ensemble": {**recipe["teacher"]["ensemble"], **ensemble}}
    return {**recipe, "teacher": teacher}


@pytest.mark.slow
def test_weights_are_learnt_once_for_a_run_and_one_teacher_at_a_time_changes_nothing(given, tmp_path, monkeypatch):
    recipe = changed(given, learn_weights=True)
    whole = distill_llm.run(recipe, tmp_path / "whole")
    found = json.loads((tmp_path / "whole" / "state.json").read_text())["stages"]["ensemble"]
    assert sum(found["weights"]) == pytest.approx(1) and found["items"] == 24
    assert found["loss"] < min(found["alone"]) - 1e-3 and sum(weight > 0.01 for weight in found["weights"]) > 1
    shares = [model["weight"] for model in whole.metrics["ensemble"]["models"]]
    assert shares == pytest.approx(found["weights"])
    shown = ", ".join(f"{share:.2f} {name}" for share, name in zip(shares, ("teacher", "second", "third"), strict=True))
    assert shown in (tmp_path / "whole" / "report.html").read_text()

    fixed = changed(given, weight=max(shares[0], 1e-9))
    for member, share in zip(fixed["teacher"]["ensemble"]["others"], shares[1:], strict=True):
        member["weight"] = max(share, 1e-9)
    distill_llm.run(fixed, tmp_path / "fixed")
    one, other = weights(tmp_path / "fixed" / "student"), weights(tmp_path / "whole" / "student")
    assert all((one[name] - other[name]).abs().max() < 1e-4 for name in one if "key.bias" not in name)

    training = recover.train_model
    monkeypatch.setattr(recover, "train_model", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        distill_llm.run(changed(recipe, one_at_a_time=True), tmp_path / "again")
    monkeypatch.setattr(recover, "train_model", training)
    monkeypatch.setattr(stage, "learn", None)  # not learnt a second time
    distill_llm.run(changed(recipe, one_at_a_time=True), tmp_path / "again")
    assert same(weights(tmp_path / "again" / "student"), other)
    left = [path.name for path in (tmp_path / "again").rglob("*") if "teachers" in path.name or "teacher-" in path.name]
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mean", "learnt", "rows"])
def test_a_cache_of_several_teachers_teaches_what_they_teach(given, tmp_path, kind):
    recipe = changed(given, **({"learn_weights": True, "one_at_a_time": True} if kind == "learnt" else {}))
    if kind == "rows":
        file = tmp_path / "rows.csv"
        head, *lines = file.read_text().splitlines()
        lines = list(dict.fromkeys(lines))  # a row that stands twice may not have two teachers
        file.write_text("\n".join([f"{head},kind", *(f"{line},k{i % 3}" for i, line in enumerate(lines))]))
        recipe = changed(recipe, teaches=["k0"])
        for number, member in enumerate(recipe["teacher"]["ensemble"]["others"], 1):
            member["teaches"] = [f"k{number}"]
        recipe["data"]["columns"]["teacher_of"], recipe["data"]["holdout_examples"] = "kind", 0
    online = distill_llm.run(recipe, tmp_path / "online").metrics
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(app, ["cache", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "cache")])
    assert result.exit_code == 0, result.output
    from_cache = {**recipe, "teacher": {**recipe["teacher"], "cache": str(tmp_path / "cache")}}
    cached = distill_llm.run(from_cache, tmp_path / "cached").metrics
    one, other = weights(tmp_path / "cached" / "student"), weights(tmp_path / "online" / "student")
    assert all((one[name] - other[name]).abs().max() < 1e-4 for name in one if "key.bias" not in name)
    assert cached["ensemble"] == online["ensemble"]
    learnt = read_index(tmp_path / "cache").weights
    assert (learnt is not None) == (kind == "learnt")
    again = CliRunner().invoke(app, ["cache", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "cache")])
    assert again.exit_code == 0, again.output

    other = {"rows": {"teaches": ["k1"]}}.get(kind, {"average": "logits"})
    if kind == "rows":
        from_cache["teacher"]["ensemble"]["others"][0]["teaches"] = ["k0"]
    (line,) = faults_at_the_door(parse_recipe(changed(from_cache, **other)))
    assert line.startswith("teacher.cache: ") and "made with another teacher" in line


@pytest.mark.slow
def test_the_door_wants_rows_to_learn_weights_on(given, tmp_path):
    recipe = changed(given, learn_weights=True)
    recipe["data"]["holdout_examples"] = 0
    (line,) = faults_at_the_door(parse_recipe(recipe))
    assert line.startswith("teacher.ensemble.learn_weights: got True; set data.holdout_examples")


@pytest.mark.parametrize(
    ("ensemble", "teacher", "message"),
    [
        ({"learn_weights": True, "weight": 2}, {}, "teacher.ensemble.weight: got 2.0; leave it out"),
        ({"learn_weights": True, "confidence": True}, {}, "teacher.ensemble.confidence: got True; leave it out"),
        ({"one_at_a_time": True}, {"quantization": "8bit"}, "teacher.ensemble.one_at_a_time: got True; remove it"),
    ],
)
def test_the_recipe_refuses_what_learnt_weights_and_waiting_ones_do_not_go_with(tmp_path, ensemble, teacher, message):
    recipe = recipe_for(tmp_path)
    recipe["teacher"] |= {"ensemble": {"others": [{"model": "second"}], **ensemble}, **teacher}
    with pytest.raises(InputError) as caught:
        parse_recipe(recipe)
    assert str(caught.value).startswith(message)
