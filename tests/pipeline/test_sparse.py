"""Runs that set single weights to zero: alone, after heads and neurons, over rounds, and what the door refuses."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from builders.recipes import faults_at_the_door, recipe_for, recipe_with, write_model, write_recipe
from builders.runs import rows_of, same, two_rounds, weights, write_learnable_rows
from typer.testing import CliRunner

import distill_llm
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.models.masks import MASKS, Masks, linears_of, sparsity_of
from distill_llm.pipeline.run import prune_recipe
from distill_llm.recipe.recipe import load_recipe, parse_recipe
from distill_llm.training.trainer import DistillationTrainer

PAGE = Path(__file__).parents[2] / "docs" / "methods" / "sparsity.md"
ALONE = {"rounds": 2, "schedule": "linear", "calibration_examples": 8}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    write_model(folder / "teacher", max_position_embeddings=64)
    write_learnable_rows(folder / "rows.csv")
    return folder


def recipe(folder, pruning=ALONE, **weights):
    given = two_rounds(folder, pruning={**pruning, "weights": weights}, data=rows_of(folder))
    return {**given, "teacher": {"model": str(folder / "teacher")}}


def zeros_of(folder):
    masks, model = Masks.load(folder / MASKS), distill_llm.load_pretrained(folder)
    masks.check(model)
    for name, mask in masks.kept.items():
        assert not linears_of(model)[name].weight[~mask].any(), name
    assert sparsity_of(model) == pytest.approx(masks.sparsity, abs=1e-3)
    return masks


@pytest.mark.slow
@pytest.mark.parametrize(
    "given", [{"criterion": "sparsegpt", "pattern": "2:4"}, {"criterion": "taylor", "sparsity": 0.6}]
)
def test_zeros_grow_over_rounds_and_stay_to_the_saved_student(teacher, tmp_path, given, monkeypatch, capsys):
    result = distill_llm.run(recipe(teacher, **given), tmp_path / "run")
    share = given.get("sparsity", 0.5)
    first, second = (zeros_of(tmp_path / "run" / f"round-{n}" / "pruned") for n in (1, 2))
    assert [first.sparsity, second.sparsity] == pytest.approx([share / 2, share], abs=1e-3)
    for name in ("round-1/student", "round-2/student", "student"):
        masks = zeros_of(tmp_path / "run" / name)
        wanted = first if name.startswith("round-1") else second
        assert all(torch.equal(mask, wanted.kept[linear]) for linear, mask in masks.kept.items())
    assert not any((second.kept[name] & ~mask).any() for name, mask in first.kept.items())
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["sparsity"]["share"] == pytest.approx(share, abs=1e-3) and metrics["params_kept"] == 1
    sizes = metrics["sparsity"]["compressed_mb"]
    assert sizes["student"] < 0.9 * sizes["teacher"]
    assert (metrics["rounds"][0]["score_compensated"] is None) == (given["criterion"] == "taylor")
    report = (tmp_path / "run" / "report.md").read_text()
    assert "| zero weights of the linears | " in re.sub(" +", " ", report) and f"{share:.1%}" in report
    assert "computes faster" in report and "weights after zlib" in (tmp_path / "run" / "report.html").read_text()
    assert f"{share:.1%} of the linears' weights are zero" in capsys.readouterr().out.replace("\n", " ")
    assert result.student_dir == tmp_path / "run" / "student"

    step, left = DistillationTrainer.training_step, [5]

    def stopped(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DistillationTrainer, "training_step", stopped)
        distill_llm.run(recipe(teacher, **given), tmp_path / "stopped")
    distill_llm.run(recipe(teacher, **given), tmp_path / "stopped")
    assert same(weights(tmp_path / "stopped" / "student"), weights(tmp_path / "run" / "student"))


@pytest.mark.slow
def test_a_student_without_heads_and_neurons_can_be_sparse_too(teacher, tmp_path):
    pruning = {"keep": 0.6, "round_to": 4, "calibration_examples": 8}
    distill_llm.run(recipe(teacher, pruning, pattern="2:4", criterion="wanda"), tmp_path / "run")
    masks = zeros_of(tmp_path / "run" / "student")
    assert masks.sparsity == 0.5
    whole = sum(
        module.weight.numel() for module in linears_of(distill_llm.load_pretrained(teacher / "teacher")).values()
    )
    assert masks.weights < 0.62 * whole
    # Its zeros stay where it is trained again, as a given student.
    again = {**recipe(teacher), "pruning": None, "student": {"model": str(tmp_path / "run" / "student")}}
    distill_llm.run(again, tmp_path / "again")
    assert zeros_of(tmp_path / "again" / "student").zeros == masks.zeros
    assert not same(weights(tmp_path / "again" / "student"), weights(tmp_path / "run" / "student"))
    again["student"]["peft"] = {"r": 2, "target_modules": ["query"]}
    lines = faults_at_the_door(parse_recipe({**again, "output_dir": str(tmp_path / "x")}))
    assert any("would fill the zeros" in line for line in lines)


@pytest.mark.slow
def test_zeros_stay_over_generations_and_under_rounding(teacher, tmp_path):
    given = recipe(teacher, {"calibration_examples": 8}, pattern="2:4", criterion="wanda")
    given["distillation"] = {**given["distillation"], "generations": {"count": 2}}
    given["quantize"] = {"bits": 8, "train": {"max_steps": 4}}
    distill_llm.run(given, tmp_path / "run")
    first = zeros_of(tmp_path / "run" / "round-1" / "pruned")
    for name in ("round-1/student", "round-1/generation-2", "quantize/student"):
        masks = zeros_of(tmp_path / "run" / name)
        assert all(torch.equal(mask, first.kept[linear]) for linear, mask in masks.kept.items())
    learnt = [weights(tmp_path / "run" / name) for name in ("round-1/chosen", "quantize/student")]
    assert not same(*learnt)
    student, masks = (
        distill_llm.load_pretrained(tmp_path / "run" / "student"),
        Masks.load(tmp_path / "run/student" / MASKS),
    )
    for name, mask in masks.kept.items():
        whole = student.get_submodule(name).weight.dequantize()
        assert type(student.get_submodule(name).weight.data) is not torch.Tensor and not whole[~mask].any(), name
    sizes = json.loads((tmp_path / "run" / "metrics.json").read_text())["sparsity"]["compressed_mb"]
    assert 0 < sizes["student"] < 0.7 * sizes["teacher"]


@pytest.mark.slow
def test_the_commands_say_what_is_zero(teacher, tmp_path):
    given = {
        "teacher": {"model": str(teacher / "teacher")},
        "data": rows_of(teacher),
        "pruning": {"weights": {"sparsity": 0.5, "criterion": "magnitude"}},
        "output_dir": str(tmp_path / "out"),
    }
    assert zeros_of(prune_recipe(parse_recipe(given))).zeros
    shown = CliRunner().invoke(app, ["profile", str(tmp_path / "out"), "--batch-size", "1", "--sequence-length", "8"])
    assert "zero weights of the linears" in shown.output and "50.0%" in shown.output
    columns = "text=review,label=mood"
    options = [
        "--task",
        "classification",
        "--data",
        str(teacher / "rows.csv"),
        "--columns",
        columns,
        "--max-length",
        "16",
    ]
    file = tmp_path / "scores.json"
    shown = CliRunner().invoke(app, ["evaluate", str(tmp_path / "out"), *options, "--output", str(file)])
    assert shown.exit_code == 0, shown.output
    assert json.loads(file.read_text())["zero_weights"] == pytest.approx(0.5, abs=1e-3)


def test_a_pattern_without_quotes_is_read_and_kept(tmp_path):
    file = write_recipe(tmp_path, recipe_for(tmp_path))
    text = file.read_text().replace("keep: 0.5", "weights: {pattern: 2:4, criterion: wanda}")
    file.write_text(text)
    found = load_recipe(file)
    assert (found.pruning.keep, found.pruning.weights.pattern) == (1.0, "2:4")
    assert parse_recipe(yaml.safe_load(found.to_yaml())) == found


@pytest.mark.parametrize(
    "weights, said",
    [
        ({"sparsity": 0.5, "pattern": "2:5:1"}, "pruning.weights.pattern: got '2:5:1'"),
        ({"sparsity": 0.6, "pattern": "2:4"}, "pruning.weights.sparsity: got 0.6; leave it out, or set it to 0.5"),
        ({"sparsity": 0.5, "criterion": "wnada"}, "pruning.weights.criterion: got 'wnada'; accepted: "),
        ({"sparsity": 0.5, "criterion": "magnitude", "layers_at_once": 1}, "reads no calibration rows"),
        ({"sparsity": 0.5, "criterion": "taylor", "layers_at_once": 1}, "all layers are compared at once"),
        ({"sparsity": 0.5, "criterion": "sparsegpt", "scope": "row"}, "within blocks"),
    ],
)
def test_what_contradicts_itself_is_refused_with_its_field(tmp_path, weights, said):
    with pytest.raises(InputError) as error:
        parse_recipe(recipe_for(tmp_path, pruning={"weights": weights}))
    assert said in str(error.value)


def test_adapters_on_a_sparse_student_and_groups_that_do_not_fit_are_refused_at_the_door(tmp_path):
    write_model(tmp_path / "teacher", intermediate=30, max_position_embeddings=64)
    write_learnable_rows(tmp_path / "rows.csv")
    with pytest.raises(InputError, match="student.peft.*would fill their zeros"):
        recipe_with(
            tmp_path, pruning={"weights": {"sparsity": 0.5}}, student__peft={"r": 2, "target_modules": ["query"]}
        )
    lines = faults_at_the_door(recipe_with(tmp_path, pruning={"weights": {"pattern": "2:4"}}))
    assert any(line.startswith("pruning.weights.pattern: got '2:4'; accepted: M that divides") for line in lines)
    write_model(tmp_path / "teacher", max_position_embeddings=64)
    lines = faults_at_the_door(recipe_with(tmp_path, pruning={"keep": 0.5, "weights": {"pattern": "2:4"}}))
    assert [line for line in lines if line.startswith("pruning.round_to: got 1; set it to a multiple of 4")]
    write_model(tmp_path / "teacher", hidden=24, heads=4, intermediate=48, max_position_embeddings=64)
    lines = faults_at_the_door(
        recipe_with(tmp_path, pruning={"keep": 0.5, "round_to": 4, "weights": {"pattern": "2:4"}})
    )
    assert lines == [
        "pruning.units: got ['heads', 'neurons']; leave heads out: of this model one takes 6 inputs of a linear with it,"
        " which are no groups of 4"
    ]


def test_the_recipe_of_the_page_is_read(tmp_path):
    for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL):
        found = parse_recipe({**recipe_for(tmp_path), **yaml.safe_load(text)})
        assert found.pruning.weights is not None
