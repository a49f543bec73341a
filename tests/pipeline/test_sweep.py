"""Sweeps: each cell is the run that it would be alone, and what cells share is made once."""

import json
import shutil

import pytest
from builders.reports import cell_metrics
from builders.runs import same, two_rounds, weights

import distill_llm
from distill_llm.common.errors import InputError
from distill_llm.common.finite import NotFinite
from distill_llm.pipeline import calibration
from distill_llm.pipeline import sweep as sweeps
from distill_llm.pipeline.run import RunResult
from distill_llm.pipeline.stages import recover, teacher


@pytest.fixture
def recipe(inputs, tmp_path):
    """One round, in a folder of its own."""
    given = two_rounds(inputs, output_dir=str(tmp_path / "run"))
    return {**given, "pruning": {**given["pruning"], "rounds": 1}}


@pytest.fixture
def work(monkeypatch):
    """What is done: trainings of teachers and students, and passes over calibration data."""
    done = []
    for module, name, what in (
        (teacher, "train_model", "teacher"),
        (recover, "train_model", "student"),
        (calibration, "collect_statistics", "statistics"),
    ):
        real = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *a, _real=real, _what=what, **k: (done.append(_what), _real(*a, **k))[1]
        )
    return done


@pytest.mark.slow
def test_each_cell_is_the_run_that_it_would_be_alone_and_what_they_share_is_made_once(recipe, tmp_path, work):
    over = {"pruning.criterion": ["magnitude", "fisher"]}
    result = distill_llm.sweep(recipe, keep=[0.5], over=over)
    assert sorted(work) == ["statistics", "student", "student", "teacher"]
    folder = tmp_path / "run-sweep"
    assert [cell.folder for cell in result.cells] == [
        folder / f"keep-0.5_criterion-{criterion}" for criterion in ("magnitude", "fisher")
    ]
    chosen = {**recipe["pruning"], "keep": 0.5, "criterion": "fisher"}
    alone = distill_llm.run({**recipe, "pruning": chosen}, tmp_path / "alone")
    cell = result.cells[-1]
    for part in ("teacher", "student"):
        assert same(weights(tmp_path / "alone" / part), weights(cell.folder / part))
    for key in ("teacher", "student"):
        assert cell.metrics[key]["metrics"] == alone.metrics[key]["metrics"]

    work.clear()
    shutil.rmtree(result.cells[0].folder)  # the others are whole without it
    again = distill_llm.sweep(recipe, keep=[0.5], over={"pruning.criterion": ["magnitude", "fisher", "taylor"]})
    assert work == ["student", "student"]
    written = json.loads((folder / "sweep.json").read_text())
    assert written == json.loads(json.dumps(again.record))
    assert [each["student"]["score"] for each in written["cells"]] == [
        c.metrics["student"]["score"] for c in again.cells
    ]
    assert "keep-0.5_criterion-taylor" in again.report.read_text()

    work.clear()
    resumed = distill_llm.run(distill_llm.load_recipe(cell.folder / "recipe.yaml"))  # an ordinary run folder
    assert resumed.metrics == cell.metrics and not work


@pytest.mark.slow
def test_a_changed_recipe_is_named_before_any_cell_is_begun(recipe, tmp_path, work):
    distill_llm.sweep(recipe, keep=[0.5])
    work.clear()
    changed = {**recipe, "final": {"learning_rate": 1e-5}}
    with pytest.raises(InputError, match="keep-0.5.*final.learning_rate"):
        distill_llm.sweep(changed, keep=[0.7, 0.5])
    assert not work and not (tmp_path / "run-sweep" / "keep-0.7").exists()


def test_faults_of_any_cell_stop_a_sweep_before_it_writes(recipe, inputs, tmp_path):
    for change, over, words in (
        ({}, {"pruning.keep": [0.5, 0.0001]}, "pruning.keep: got 0.0001"),
        ({}, {"data.max_length": [16, 4096]}, "data.max_length: got 4096"),
        ({"hub": {"repo_id": "me/student"}}, {"pruning.keep": [0.5, 0.7]}, "hub.repo_id.*distill-llm push"),
    ):
        with pytest.raises(InputError, match=words):
            distill_llm.sweep({**recipe, **change}, over=over)
        assert not (tmp_path / "run-sweep").exists()
    (tmp_path / "run-sweep").mkdir()
    (tmp_path / "run-sweep" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="output_dir"):
        distill_llm.sweep(recipe, keep=[0.5])


@pytest.mark.slow
def test_a_training_that_ends_in_nan_stops_its_cell_alone(recipe, tmp_path, monkeypatch):
    def carry_out(context, donor=None):
        if context.recipe.pruning.keep == 0.5:
            raise NotFinite("losses.logits", "nan", "lower the learning_rate", step=3)
        return RunResult(cell_metrics(0.7, 2e6, 50), context.student_dir, context.report_file, context.page_file)

    monkeypatch.setattr(sweeps, "carry_out", carry_out)
    result = distill_llm.sweep(recipe, keep=[0.7, 0.5, 0.3])
    assert [cell.error is None for cell in result.cells] == [True, False, True]
    assert "losses.logits is nan" in result.page.read_text() and "failed" in result.report.read_text()


@pytest.mark.slow
def test_a_teacher_that_ends_in_nan_is_not_trained_again_for_other_sizes(recipe, tmp_path, monkeypatch):
    def train(*args, **options):
        begun.append(1)
        raise NotFinite("losses.labels", "nan", "lower the learning_rate", step=3)

    begun = []
    monkeypatch.setattr(teacher, "train_model", train)
    result = distill_llm.sweep(recipe, keep=[0.7, 0.5])
    assert len(begun) == 1 and all("teacher: losses.labels is nan" in cell.error for cell in result.cells)


def test_the_disk_holds_a_shared_teacher_and_the_first_statistics_once(recipe):
    recipe["pruning"]["rounds"] = 2
    opened = sweeps.open_sweep(recipe, keep=[0.7, 0.5])
    disk = opened.runs[0][1].opened.disk
    assert disk == opened.runs[1][1].opened.disk and min(disk.teacher, disk.statistics, disk.checkpoints) > 0
    statistics = disk.statistics / 2  # of a round
    assert opened.disk == disk.teacher + 3 * statistics + 2 * disk.students + disk.checkpoints
