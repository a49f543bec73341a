"""Numbers that are not finite end a command with exit code 2 and one line, and no model of them is left on disk."""

import math
import re
from pathlib import Path

import pytest
import torch
from builders.recipes import recipe_for, write_model, write_recipe, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from distill_llm.cli.main import app

BOTH = {"labels": {}, "logits": {}}
SCORED = ["--task", "classification", "--data", "rows.csv", "--columns", "text=review,label=mood", "--max-length", "16"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a teacher, rows and a recipe of a few steps."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "start"):
        write_model(tmp_path / name, layers=2, max_position_embeddings=64)
    write_rows(tmp_path / "rows.csv")
    return tmp_path


def refused(*args: str) -> str:
    """The one line of a command that must end with exit code 2."""
    result = CliRunner().invoke(app, list(args))
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.output and len(line) < 400
    return line.removeprefix("error: ")


def spoil(folder: Path, name: str) -> None:
    """Make one number of a saved model NaN."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = math.nan
    model.save_pretrained(folder)


def run(folder: Path, losses: dict, **training) -> str:
    """The line of a run that trains a student for three steps with a checkpoint after each."""
    training = {"max_steps": 3, "per_device_train_batch_size": 8, "save_steps": 1, **training}
    changes = {"pruning": None, "student": {"model": "start"}, "distillation": {"losses": losses, **training}}
    write_recipe(folder, recipe_for(folder, **changes))
    return refused("run", "recipe.yaml")


def assert_no_student(folder: Path) -> None:
    """A run left no student, and checkpoints of finite weights alone."""
    assert not list(folder.rglob("run/**/student/"))
    for file in folder.rglob("run/**/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values()), file


def test_a_teacher_with_a_nan_is_refused_by_every_command_that_computes_with_it(folder):
    spoil(folder / "teacher", "classifier.weight")
    scoring = (
        "the output of BertForSequenceClassification in scoring is nan; score a model with finite numbers: "
        "its weight classifier.weight holds nan"
    )
    assert run(folder, BOTH) == f"teacher: {scoring}"
    assert refused("evaluate", "teacher", *SCORED) == scoring
    cut = refused("prune", "teacher", *SCORED, "--keep", "0.5", "--output-dir", "cut")
    assert cut.startswith("a weight is nan in classifier.weight; prune a model with finite weights")
    assert not (folder / "evaluation.json").exists()
    assert_no_student(folder)


@pytest.mark.parametrize(
    ("losses", "training", "words"),
    [
        (BOTH, {"learning_rate": 1e6}, r"losses\.labels is (nan|inf) at step 2; lower learning_rate"),
        ({"labels": {"weight": 1e30}}, {}, r"the norm of the gradient is (nan|inf).* at step 1; lower learning_rate"),
        ({"labels": {"weight": 1e30}}, {"on_nonfinite": "skip"}, r"the norm .* at step 3; .*: 3 steps in a row"),
    ],
)
def test_a_run_whose_numbers_overflow_ends_in_one_line_and_leaves_no_student(folder, losses, training, words):
    line = run(folder, losses, **training)
    assert re.match("final: |recover: |.*recover: ", line) and re.search(words, line), line
    assert_no_student(folder)
