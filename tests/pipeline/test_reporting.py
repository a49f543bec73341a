"""The report of a finished run: what its stages kept for it, and the command that makes it again."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from builders.runs import two_rounds
from typer.testing import CliRunner

import distill_llm
from distill_llm.cli.main import app
from distill_llm.common.errors import InputError
from distill_llm.pipeline.reporting import rewrite_report
from distill_llm.pipeline.state import State, read_state, write_state
from distill_llm.pipeline.train_model import MOST_LOGS, loss_history

NEW = ("report.html", "disagreements.json")


def test_losses_are_kept_by_step_and_thinned() -> None:
    log = [{"step": n, "loss": n / 2, "loss/logits": float(n)} for n in range(1, 3 * MOST_LOGS)]
    log[0].pop("loss/logits")
    history = loss_history([*log, {"step": 999, "train_loss": 1.0}, {"step": 999, "eval_loss": 1.0}])
    assert history["steps"] == list(range(1, 3 * MOST_LOGS, 3)) and len(history["steps"]) == MOST_LOGS
    assert history["losses"]["loss"] == [n / 2 for n in history["steps"]]
    assert history["losses"]["loss/logits"] == [None, *map(float, history["steps"][1:])]
    assert loss_history([]) == {"steps": [], "losses": {}}


@pytest.mark.slow
def test_a_run_keeps_what_its_page_shows(finished, inputs) -> None:
    folder, metrics = finished.page.parent, finished.metrics
    state = json.loads((folder / "state.json").read_text())["stages"]
    trained = ["teacher", "round-1/recover", "round-2/recover"]
    assert list(metrics["history"]) == trained
    for name in trained:
        history = metrics["history"][name]
        assert history == state[name]["history"] and history["steps"] == sorted(set(history["steps"]))
        terms = {"labels"} if name == "teacher" else {"labels", "logits", "hidden", "attention"}
        assert {term.removeprefix("loss/") for term in history["losses"]} == {"loss", *terms}
    assert metrics["stages"] == {name: state[name]["seconds"] for name in state if name != "report"}
    assert sum(metrics["stages"].values()) == pytest.approx(metrics["seconds"], abs=0.1)
    latency = [p for p in metrics["latency_grid"] if (p["batch_size"], p["sequence_length"]) == (2, 8)]
    assert [p["model_ms"] for p in latency] == [metrics["student"]["latency_ms"]]
    shown = json.loads((folder / "disagreements.json").read_text())
    texts = [line.split(",")[0] for line in (inputs / "rows.csv").read_text().splitlines()[1:]]
    assert shown["rows"] == 4 and 0 < len(shown["examples"]) <= 4
    assert {each["text"] for each in shown["examples"]} <= set(texts)
    assert not any(text in (folder / "student" / "metrics.json").read_text() for text in texts), "it is pushed"
    page = finished.page.read_text()
    assert page.count("<svg") == 3 and all(each["text"] in page for each in shown["examples"])


@pytest.mark.slow
def test_the_report_of_a_finished_run_is_made_again_and_the_run_stays_finished(finished, inputs, tmp_path) -> None:
    shutil.copytree(finished.page.parent, tmp_path / "run")
    file = tmp_path / "run" / "metrics.json"
    metrics = json.loads(file.read_text())
    for new in ("history", "stages", "latency_grid", "seed"):  # as an earlier version left it
        del metrics[new]
    file.write_text(json.dumps(metrics))
    (tmp_path / "run" / "disagreements.json").unlink()
    (tmp_path / "run" / "report.html").unlink()
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run")])
    assert result.exit_code == 0 and "report.html" in result.output
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Losses over time" in page and "round-2/prune" in page and "disagree" not in page
    shutil.copytree(finished.page.parent, tmp_path / "again")
    rewrite_report(tmp_path / "again")
    assert (tmp_path / "again" / "report.html").read_bytes() == finished.page.read_bytes()
    stages = json.loads((tmp_path / "again" / "state.json").read_text())["stages"]
    distill_llm.run(two_rounds(inputs), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "state.json").read_text())["stages"] == stages


@pytest.mark.slow
def test_a_run_of_a_version_without_pages_gets_one_and_does_nothing_again(finished, inputs, tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.page.parent, folder)
    state = read_state(folder)
    recipe = {name: section for name, section in state.recipe.items() if name not in ("report", "export")}
    recipe["evaluation"] = {name: value for name, value in recipe["evaluation"].items() if name != "harness"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    stages = {name: {**result, "history": None} for name, result in state.stages.items()}
    files = {
        name: {file: seal for file, seal in seals.items() if file not in NEW} for name, seals in state.files.items()
    }
    write_state(folder, State(recipe, state.inputs, stages, files))
    for name in NEW:
        (folder / name).unlink()
    result = distill_llm.run(two_rounds(inputs), folder)
    assert read_state(folder).stages == stages and result.metrics == finished.metrics
    assert "Results" in result.page.read_text() and not (folder / "disagreements.json").exists()


@pytest.mark.slow
def test_rows_and_further_batches_can_be_left_out_of_a_run_that_is_done(finished, inputs, tmp_path) -> None:
    shutil.copytree(finished.page.parent, tmp_path / "run")
    before = json.loads((tmp_path / "run" / "state.json").read_text())["stages"]
    less = two_rounds(inputs, report={"examples": 0, "latency_grid": False})
    result = distill_llm.run(less, tmp_path / "run")
    after = json.loads((tmp_path / "run" / "state.json").read_text())["stages"]
    assert {name for name in after if after[name] != before[name]} == {"report"}
    assert result.metrics["latency_grid"] == [] and (tmp_path / "run" / "disagreements.json").read_text() == "{}\n"
    page = result.page.read_text()
    assert "disagree" not in page and "over batch" not in page and page.count("<svg") == 2


def test_a_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^run_dir: got .*the folder of a run"):
        rewrite_report(tmp_path)
    with pytest.raises(InputError, match="^run_dir"):
        rewrite_report(tmp_path / "nothing")
