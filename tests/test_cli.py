"""The command line: exit codes, one line per fault, nothing written on bad input, and what commands hand on."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from recipe_inputs import recipe_for, write_model, write_recipe, write_rows
from typer.testing import CliRunner

from distill_llm.cli import app
from distill_llm.recipe import Recipe, recipe_names

COMMANDS = ["run", "prune", "distill", "evaluate", "profile", "push", "recipes"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with a teacher, rows and a recipe for them."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "teacher", max_position_embeddings=160)
    write_rows(tmp_path / "rows.csv")
    write_recipe(tmp_path, recipe_for(tmp_path))
    return tmp_path


@pytest.fixture
def calls(monkeypatch):
    """Calls of a pipeline that does nothing, in the place of the real one."""
    seen: list = []
    fake = types.ModuleType("distill_llm.pipeline")
    result = types.SimpleNamespace(metrics={}, student_dir=Path("student"), report=Path("report.md"))
    fake.run = lambda recipe, output_dir: seen.append((recipe, output_dir)) or result
    fake.prune_model = lambda *args, **options: seen.append((args, options)) or Path("pruned")
    monkeypatch.setitem(sys.modules, "distill_llm.pipeline", fake)
    monkeypatch.setattr(sys.modules["distill_llm"], "pipeline", fake, raising=False)
    return seen


def call(*args: str):
    """The result of the command line."""
    return CliRunner().invoke(app, list(args))


def refused(*args: str) -> list[str]:
    """The lines on stderr of a command that must be refused."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert lines and all(line.startswith("error: ") for line in lines), result.stderr
    return [line.removeprefix("error: ") for line in lines]


def python(*args: str) -> subprocess.CompletedProcess:
    """A fresh Python that finds the package."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example: distill-llm {command}" in result.stdout


@pytest.mark.parametrize(
    ("setting", "field", "given", "accepted"),
    [
        ("pruning.keep=1.7", "pruning.keep", "1.7", "at most 1"),
        ("pruning.kep=0.5", "pruning.kep", "0.5", "'keep' (the nearest)"),
        ("pruning.rounds=0", "pruning.rounds", "0", "at least 1"),
        ("pruning.keep=half", "pruning.keep", "'half'", "a number"),
        ("distillation.losses.logits.temperature=-1", "distillation.losses.logits.temperature", "-1", "above 0"),
        ("data.task=sst3", "data.task", "'sst3'", "'sst2' (the nearest)"),
        ("data.path=no/such/folder", "data.path", "'no/such/folder'", "existing"),
        ("data.columns.text=revue", "data.columns.text", "'revue'", "review"),
        ("teacher.model=no/such/folder", "teacher.model", "'no/such/folder'", "existing folder"),
    ],
)
def test_bad_input_exits_with_2_and_one_line_and_writes_nothing(folder, calls, setting, field, given, accepted):
    before = sorted(folder.rglob("*"))
    (line,) = refused("run", "recipe.yaml", "--set", setting)
    assert line.startswith(f"{field}: got {given}; accepted: ") and accepted in line
    assert sorted(folder.rglob("*")) == before and not calls


def test_labels_that_do_not_match_and_a_family_that_cannot_be_pruned_exit_with_2(folder, calls):
    write_rows(folder / "rows.csv", labels=("a", "b", "c"))
    config = folder / "teacher" / "config.json"
    config.write_text(config.read_text().replace('"model_type": "bert"', '"model_type": "ernie"'))
    labels, family = refused("run", "recipe.yaml")
    assert "with 2 labels" in labels and "family ernie" in family
    assert not calls and not (folder / "run").exists()


def test_usage_errors_are_one_line_too(folder):
    assert "keep" in refused("prune", "teacher", "--task", "sst2", "--output-dir", "x")[0]
    assert "'rnu'" in refused("rnu")[0]
    assert refused("run", "quickstat")[0].startswith("RECIPE: got 'quickstat'; accepted: ")


def test_run_hands_the_recipe_with_overrides_to_the_pipeline(folder, calls):
    result = call("run", "recipe.yaml", "--set", "pruning.keep=0.25", "--output-dir", "elsewhere")
    assert result.exit_code == 0, result.output
    ((recipe, output_dir),) = calls
    assert isinstance(recipe, Recipe) and recipe.pruning.keep == 0.25
    assert output_dir == recipe.output_dir == Path("elsewhere")
    assert "report.md" in result.stdout


def test_distill_leaves_pruning_out_and_takes_the_student(folder, calls):
    write_model(folder / "student", layers=1)
    result = call("distill", "recipe.yaml", "--student", "student")
    assert result.exit_code == 0, result.output
    assert calls[0][0].pruning is None and calls[0][0].student.model == "student"
    (line,) = refused("distill", "recipe.yaml")
    assert "student.model" in line


def test_prune_checks_its_options_under_their_own_names(folder, calls, glue_dir):
    args = ["--task", "sst2", "--data", str(glue_dir / "SST-2"), "--output-dir", "out"]
    fields = [line.split(":")[0] for line in refused("prune", "teacher", *args, "--keep", "2", "--round-to", "x")]
    assert fields == ["--keep", "--round-to"]
    assert refused("prune", "missing/teacher/x", *args, "--keep", "0.5")[0].startswith("MODEL: got 'missing/teacher/x'")
    result = call("prune", "teacher", *args, "--keep", "0.5", "--units", "neurons", "--no-compensate")
    assert result.exit_code == 0, result.output
    ((positional, options),) = calls
    assert positional == ("teacher", "sst2", 0.5, Path("out"))
    assert options["units"] == ["neurons"] and options["compensate"] is False and options["round_to"] == 1


def test_evaluate_saves_the_share_of_right_predictions(folder, glue_dir):
    task = folder / "SST-2"
    task.mkdir()
    for name in ("train", "dev"):
        text = "\n".join((glue_dir / "SST-2" / f"{name}.tsv").read_text().splitlines()[:41])
        (task / f"{name}.tsv").write_text(text + "\n")
    args = ["evaluate", "teacher", "--task", "sst2", "--data", str(task), "--output", "metrics.json"]
    result = call(*args)
    assert result.exit_code == 0, result.output
    accuracy = json.loads((folder / "metrics.json").read_text())["accuracy"]
    assert accuracy * 40 == pytest.approx(round(accuracy * 40)) and "accuracy" in result.stdout


def test_profile_prints_both_models(folder):
    write_model(folder / "smaller", layers=1)
    args = ["--batch-size", "2", "--sequence-length", "8"]
    result = call("profile", "smaller", "--against", "teacher", *args)
    assert result.exit_code == 0, result.output
    assert "smaller" in result.stdout and "teacher" in result.stdout and "latency" in result.stdout
    assert refused("profile", "smaller", "--against", "no/such/model")[0].startswith("--against: got ")


def test_recipes_lists_every_shipped_recipe():
    result = call("recipes")
    assert result.exit_code == 0 and all(name in result.stdout for name in recipe_names())


def test_help_and_a_bad_recipe_need_no_torch_and_show_no_traceback(folder):
    code = "import sys\nfrom distill_llm.cli import app\ntry:\n    app(sys.argv[1:], prog_name='distill-llm')\n"
    code += "finally:\n    print('torch' in sys.modules)\n"
    for args, status in ((["--help"], 0), (["run", "recipe.yaml", "--set", "pruning.keep=9"], 2)):
        done = python("-c", code, *args)
        assert done.returncode == status and "Traceback" not in done.stderr
        assert done.stdout.endswith("False\n")
    assert done.stderr == "error: pruning.keep: got 9; accepted: a number above 0 and at most 1\n"


def test_the_module_is_the_command():
    done = python("-m", "distill_llm", "run", "nothing")
    assert done.returncode == 2 and done.stderr.startswith("error: RECIPE: got 'nothing'; accepted: ")
