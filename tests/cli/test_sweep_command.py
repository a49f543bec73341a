"""`distill-llm sweep`: numbers behind `--keep`, several fields, and a dry run that lists what would be done."""

import pytest
from builders.recipes import recipe_for, write_model, write_recipe, write_rows
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.pipeline import sweep as sweeps
from distill_llm.pipeline.estimating import Forecast
from distill_llm.pipeline.prices import StageCost

STAGES = (StageCost("teacher", {}, 1e10), StageCost("round-1/prune", {}, 1e10))
"""10 s each at 1e9 operations a second; four students share a teacher."""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """Runs `distill-llm sweep` where recipe.yaml is."""
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "teacher", max_position_embeddings=64)
    write_rows(tmp_path / "rows.csv")
    write_recipe(tmp_path, recipe_for(tmp_path, output_dir="run"))
    return lambda *words: CliRunner().invoke(app, ["sweep", *words])


def test_a_dry_run_lists_every_student_with_the_time_and_writes_nothing(sweep, tmp_path, monkeypatch):
    monkeypatch.setattr(sweeps, "estimate", lambda recipe, *a, **k: Forecast(STAGES, 1e9, "given", None))
    for words in (
        ["recipe.yaml", "--keep", "0.7", "0.5", "--over", "pruning.criterion=fisher,taylor", "--dry-run"],
        ["--dry-run", "--keep=0.7", "0.5", "recipe.yaml", "--over", "pruning.criterion=fisher,taylor"],
        ["--keep", "0.7,0.5", "--dry-run", "recipe.yaml", "--over", "pruning.criterion=fisher,taylor"],
    ):
        result = sweep(*words)
        assert result.exit_code == 0, result.output
        names = [f"run-sweep/keep-{k}_criterion-{c}" for k in (0.7, 0.5) for c in ("fisher", "taylor")]
        assert all(name in result.output for name in names) and "4 of 4 to do: about 50 s on" in result.output
    assert not (tmp_path / "run-sweep").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["recipe.yaml"], "error: keep: "),
        (["recipe.yaml", "--keep", "half"], "error: pruning.keep: got 'half'"),
        (["recipe.yaml", "--keep", "0.5", "--over", "pruning.keep=0.4"], "error: --over: got 'pruning.keep'"),
        (["recipe.yaml", "--over", "pruning.criterion"], "error: --over: got 'pruning.criterion'"),
        (["recipe.yaml", "--keep", "0.5", "other.yaml"], "error: "),
    ],
)
def test_bad_input_is_one_line(sweep, words, line):
    result = sweep(*words)
    assert result.exit_code == 2 and result.stderr.startswith(line) and len(result.stderr.splitlines()) == 1
