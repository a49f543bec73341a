"""How commands tell what they do: to people, quietly, to programs, in a terminal; and what Ctrl-C says."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import typer
from builders.recipes import recipe_for, write_model, write_recipe, write_rows
from typer.testing import CliRunner

from distill_llm.cli import group
from distill_llm.cli.group import CommandGroup
from distill_llm.cli.main import app

STAGES = ["teacher", "round-1/prune", "round-1/recover", "report"]


@pytest.fixture
def folder(tmp_path):
    """A teacher, rows and a recipe for them."""
    write_model(tmp_path / "teacher")
    write_rows(tmp_path / "rows.csv")
    write_recipe(tmp_path, recipe_for(tmp_path))
    return tmp_path


def command(*words: str) -> list[str]:
    """The words that start the command line in a fresh Python."""
    return [sys.executable, "-m", "distill_llm", *words]


def piped(folder: Path, *words: str) -> subprocess.CompletedProcess:
    """The command with both outputs in pipes."""
    return subprocess.run(command(*words), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1"}


@pytest.mark.parametrize(("name", "hint"), [("cache", True), ("families", False)])
def test_ctrl_c_says_in_one_line_how_to_go_on_and_exits_with_130(name, hint, monkeypatch):
    set_handlers = []
    monkeypatch.setattr(signal, "signal", lambda *handler: set_handlers.append(handler))
    stopped = typer.Typer(cls=CommandGroup)

    def interrupted() -> None:
        raise KeyboardInterrupt

    stopped.command(name)(interrupted)
    stopped.command("other")(lambda: None)
    result = CliRunner().invoke(stopped, [name])
    assert result.exit_code == 130 and result.stdout == ""
    assert set_handlers == [(signal.SIGINT, signal.SIG_IGN)], "a second Ctrl-C must not break into the end"
    (line,) = result.stderr.splitlines()
    assert ("the same command again" in line) == hint


def test_the_commands_that_go_on_are_commands():
    names = {each.name or each.callback.__name__ for each in app.registered_commands}
    assert set(group.RESUMABLE) <= names


def test_minus_h_is_help_for_the_program_and_its_commands():
    for words in ([], ["run"], ["estimate"]):
        short, long = (CliRunner().invoke(app, [*words, option]) for option in ("-h", "--help"))
        assert short.exit_code == 0 and short.stdout == long.stdout != ""
        assert "..." not in short.stdout.partition("Commands:")[2], "what a command does is a whole sentence"


def test_names_of_recipes_complete(monkeypatch):
    for words, wanted in (("distill-llm run quick", "quickstart"), ("distill-llm est", "estimate")):
        monkeypatch.setenv("_DISTILL_LLM_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        result = CliRunner().invoke(app, [], prog_name="distill-llm")
        assert wanted in result.stdout.split(), result.output


@pytest.mark.slow
def test_a_program_reads_an_object_for_each_stage_and_one_at_the_end(folder):
    dry = piped(folder, "run", "recipe.yaml", "--dry-run", "--json")
    assert dry.returncode == 0, dry.stderr
    *planned, end = map(json.loads, dry.stdout.splitlines())
    assert [each["stage"] for each in planned] == STAGES and not any(each["before"] for each in planned)
    assert all(each["event"] == "planned" and each["fits"] and each["bytes"] > 0 for each in planned)
    assert end["recipe"]["pruning"]["keep"] == 0.5 and end["params"]["student"] < end["params"]["teacher"]
    assert not (folder / "run").exists()
    for before in (False, True):
        done = piped(folder, "run", "recipe.yaml", "--json")
        *stages, end = map(json.loads, done.stdout.splitlines())
        assert [(each["event"], each["stage"], each["before"]) for each in stages] == [
            ("stage", name, before) for name in STAGES
        ]
        assert end["event"] == "end" and end["metrics"] == json.loads((folder / "run/metrics.json").read_text())
    state = json.loads((folder / "run/state.json").read_text())["stages"]
    for each in stages:
        state[each["stage"]].pop("history", None)  # long, and in metrics.json
        assert {**each["result"], "seconds": each["seconds"]} == state[each["stage"]]
    assert end["student"] == str(folder / "run" / "student")


@pytest.mark.slow
def test_quiet_leaves_the_last_line(folder):
    done = piped(folder, "run", "recipe.yaml", "--quiet")
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"student: {folder}/run/student. The student (") and done.stderr == ""


@pytest.mark.slow
def test_a_pipe_gets_lines_that_are_not_written_over_and_the_table_at_the_end(folder):
    done = piped(folder, "run", "recipe.yaml")
    assert done.returncode == 0 and "\r" not in done.stdout + done.stderr
    assert "| recovered |" in re.sub(" +", " ", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("student: ")
    commands = re.findall(r"distill-llm (\w+) ", done.stdout)
    assert commands == ["profile", "export", "push"]


@pytest.mark.slow
def test_a_terminal_gets_live_bars_and_ctrl_c_can_be_followed_by_the_same_command(folder):
    recipe = recipe_for(folder)
    recipe["distillation"]["num_train_epochs"] = 500
    write_recipe(folder, recipe)
    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (40, 120))
    process = subprocess.Popen(
        command("run", "recipe.yaml"),
        cwd=folder,
        env=ENVIRONMENT,
        stdout=child,
        stderr=child,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # tests in the background inherit that it is ignored
    )
    os.close(child)
    text, begin = "", time.monotonic()
    while time.monotonic() - begin < 240:
        if select.select([parent], [], [], 1.0)[0]:
            try:
                text += os.read(parent, 65536).decode(errors="replace")
            except OSError:
                break
        if process.poll() is None and re.search(r"Training round-1/student: +\d+%.*<", text) and "stopped" not in text:
            process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    os.close(parent)
    assert "\r" in text and "Traceback" not in text
    assert text.count("stopped: the same command again goes on") == 1
    assert not (folder / "run" / "student").exists() and not list((folder / "run").rglob("*.partial"))
    assert list(json.loads((folder / "run/state.json").read_text())["stages"]) == STAGES[:2]
