"""`distill-llm quantize`: from a folder to a folder that other commands read, and a line for what does not go."""

import json

import pytest
import yaml
from builders.recipes import write_model, write_rows
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.models.checkpoint import load_pretrained
from distill_llm.recipe.recipe import parse_recipe

TASK = ["--task", "classification", "--data", "rows.csv", "--columns", "text=review,label=mood", "--max-length", "16"]


def call(*words: str):
    return CliRunner().invoke(app, list(words), catch_exceptions=True)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "student", max_position_embeddings=64)
    write_rows(tmp_path / "rows.csv")
    return tmp_path


@pytest.mark.slow
def test_a_quantized_folder_is_scored_profiled_and_not_exported_or_quantized_again(folder):
    words = ["quantize", "student", "--bits", "8", "--activations", "--smooth", "0.5", "--calibration-examples", "4"]
    done = call(*words, *TASK, "--batch-size", "2", "--sequence-length", "8")
    assert done.exit_code == 0, done.output + repr(done.exception)
    for part in ("accuracy", "weights on disk", "measured speed-up", "quantized model: student-int8"):
        assert part in done.output
    weight = load_pretrained("student-int8").bert.encoder.layer[0].intermediate.dense.weight
    assert type(weight).__name__ == "Int8Tensor" and weight.act_pre_scale is not None
    assert call("evaluate", "student-int8", *TASK).exit_code == 0
    assert 0 <= json.loads((folder / "evaluation.json").read_text())["accuracy"] <= 1
    against = call("profile", "student-int8", "--against", "student", "--batch-size", "2", "--sequence-length", "8")
    assert against.exit_code == 0 and "1.000" in against.output  # as many parameters and operations
    for wrong in (["export", "student-int8", "--format", "onnx"], ["quantize", "student-int8", "--bits", "4"]):
        refused = call(*wrong)
        assert refused.exit_code != 0 and "quantized" in str(refused.exception) + refused.output
    assert not (folder / "student-int8-onnx-f32").exists() and not (folder / "student-int8-int4").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--bits", "5"], "--bits: got 5; accepted: 8 or 4"),
        (["--bits", "8", "--activations", "--smooth", "0.5"], "--task: not given; name the task"),
        (["--bits", "4", "--group-size", "7"], "--group-size: got 7; take a size that divides"),
        (["--bits", "8", "--output", "student"], "--output: got 'student'"),
    ],
)
def test_what_does_not_go_is_one_line(folder, words, line):
    refused = call("quantize", "student", *words)
    assert refused.exit_code != 0 and line in str(refused.exception) + refused.output
    assert not (folder / "student-int8").exists()


def test_the_recipes_of_the_page_are_recipes(tmp_path, request):
    text = (request.config.rootpath / "docs/methods/quantization.md").read_text()
    blocks = [yaml.safe_load(part.split("```")[0]) for part in text.split("```yaml\n")[1:]]
    for block in blocks:
        recipe = {"teacher": {"model": "a/b"}, "data": {"task": "sst2"}, "pruning": {"keep": 0.5}}
        parsed = parse_recipe({**recipe, "distillation": {}, **block})
        assert parsed.quantize is not None and parse_recipe(yaml.safe_load(parsed.to_yaml())) == parsed
    assert len(blocks) == 2
