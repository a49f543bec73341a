"""`distill-llm respond`: what it prints, what it refuses before weights are loaded, and two processes that work as one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.causal import CHAT_TEMPLATE, THINKING_TEMPLATE
from builders.models import tiny_model
from builders.responses import PROMPTS, rows_of, save_teacher, write_prompts
from typer.testing import CliRunner

from distill_llm.cli.main import app
from distill_llm.responses import respond as module


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_teacher(tmp_path / "teacher")
    write_prompts(tmp_path / "prompts.jsonl")
    return tmp_path


def call(*options: str, teacher: str = "teacher", data: str = "prompts.jsonl", output: str = "out"):
    return CliRunner().invoke(app, ["respond", teacher, "--data", data, "--output-dir", output, *options])


def fault(result) -> str:
    """The one line on stderr of a command that must be refused, besides the bar of reading the data."""
    assert result.exit_code == 2 and result.stdout == "", result.output
    lines = [line for line in result.stderr.splitlines() if line and not line.startswith("Generating train split")]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0].removeprefix("error: ")


def test_it_says_what_is_ahead_and_what_was_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_llm.common.progress.EVERY", 0.0)
    write_prompts(folder / "prompts.jsonl", [*PROMPTS, PROMPTS[0]])
    result = call("--max-new-tokens", "20", "--samples", "2", "--temperature", "0.7", "--seed", "3")
    assert result.exit_code == 0, result.output
    assert "11 prompts, 22 responses to generate, at most 440 tokens\n" in result.output
    assert "Responding: 0 of 22 responses" in result.stderr
    kept = len(rows_of(folder / "out"))
    assert "prompts:   11 (1 repeated prompts left out)" in result.stdout
    assert f"kept:      {kept} ({kept / 22:.1%}) in out" in result.stdout and kept
    again = call("--max-new-tokens", "20", "--samples", "2", "--temperature", "0.7", "--seed", "3")
    assert again.stdout == result.stdout.partition("\n")[2]  # nothing is ahead any more


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--temperature", "-1"], "--temperature: got -1.0; accepted: a number of at least 0"),
        (["--temperature", "nan"], "--temperature: got nan"),
        (["--top-p", "0"], "--top-p: got 0.0"),
        (["--top-k", "-1"], "--top-k: got -1"),
        (["--samples", "0"], "--samples: got 0"),
        (["--samples", "2", "--temperature", "0"], "--samples: got 2; accepted: 1 with a temperature of 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens: got 0"),
        (
            ["--max-new-tokens", "60"],
            "--max-new-tokens: got 60; accepted: at most 49: teacher takes 64 tokens",
        ),
        (["--max-new-tokens", "64"], "--max-new-tokens: got 64; accepted: at most 49"),
        (["--seed", "-1"], "--seed: got -1"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--max-prompts", "0"], "--max-prompts: got 0"),
        (["--dtype", "int8"], "--dtype: got 'int8'; accepted: one of float32, bfloat16, float16"),
        (["--prompt-column", "promt"], "--prompt-column: got 'promt'; accepted: 'prompt' (the nearest)"),
        (
            ["--chat-template-kwargs", "{a: 1}"],
            "--chat-template-kwargs: got {'a': 1}; leave it out, or set `--chat`",
        ),
        (["--chat-template-kwargs", "a=1"], "--chat-template-kwargs: got 'a=1'; accepted: a mapping"),
        (["--chat-template-kwargs", "{a: ["], "--chat-template-kwargs: got '{a: ['; accepted: valid YAML"),
        (["--chat"], "TEACHER: got 'teacher'; accepted: a model whose tokenizer has a chat template"),
    ],
)
def test_bad_input_is_one_line_before_the_weights_are_loaded(options, line, folder, monkeypatch) -> None:
    monkeypatch.setattr(module, "load_pretrained", None)
    result = call(*options)
    assert fault(result).startswith(line)
    assert not (folder / "out").exists()


def test_encoders_missing_files_and_other_settings_are_one_line(folder: Path, monkeypatch) -> None:
    save_teacher(folder / "bert", tiny_model(head="masked-lm"))
    for given, line in (
        ({"teacher": "bert"}, "TEACHER: got 'bert (BertForMaskedLM)'"),
        ({"teacher": "none"}, "TEACHER: got 'none'"),
        ({"data": "none.jsonl"}, "--data: got"),
        ({"output": "teacher"}, "--output-dir: got 'teacher'"),
    ):
        assert fault(call("--max-new-tokens", "8", **given)).startswith(line)
    assert call("--max-new-tokens", "20").exit_code == 0
    monkeypatch.setattr(module, "load_pretrained", None)
    line = fault(call("--max-new-tokens", "20", "--top-p", "0.5"))
    assert line == "--top-p: got 0.5; accepted: 1.0, with which out was begun, or another output folder"


def test_prompts_in_a_table_of_another_program(folder: Path) -> None:
    (folder / "sheet.csv").write_bytes("n|prompt\n1|café, noir\n2|thé".encode("cp1252"))
    line = fault(call("--max-new-tokens", "20", data="sheet.csv"))
    assert line.startswith("--encoding: got 'utf-8'; set it to the encoding of sheet.csv")
    line = fault(call("--max-new-tokens", "20", "--encoding", "cp1252", "--separator", ",", data="sheet.csv"))
    assert line.startswith("--prompt-column: got 'prompt'")
    assert fault(call("--separator", ";", data="prompts.jsonl")).startswith(
        "--separator: got ';'; leave it out: only .csv"
    )
    assert call("--max-new-tokens", "20", "--encoding", "cp1252", data="sheet.csv").exit_code == 0
    assert {row["prompt"] for row in rows_of(folder / "out")} <= {"café, noir", "thé"}


def test_what_the_template_is_given_is_read_checked_and_kept(folder: Path) -> None:
    save_teacher(folder / "teacher", chat_template=THINKING_TEMPLATE)
    options = ["--chat", "--max-new-tokens", "20", "--chat-template-kwargs"]
    line = fault(call(*options, "{enable_thinkin: false}"))
    assert line.startswith("--chat-template-kwargs: got 'enable_thinkin'") and "'enable_thinking' (the nearest)" in line
    assert "(put a date in quotes)" in fault(call(*options, "{enable_thinking: 2024-07-26}"))
    assert call(*options, "{enable_thinking: false}").exit_code == 0
    line = fault(call(*options, "{enable_thinking: true}"))
    assert "{'enable_thinking': False}, with which out was begun" in line
    assert fault(call(*options[:-1])).startswith("--chat-template-kwargs: not given")


@pytest.mark.slow
def test_two_processes_answer_as_one_and_together(folder: Path) -> None:
    save_teacher(folder / "teacher", chat_template=CHAT_TEMPLATE)
    options = ["--data", "prompts.jsonl", "--max-new-tokens", "40", "--samples", "40", "--batch-size", "32", "--chat"]
    root = Path(__file__).parents[2]
    settings = ["--config_file", str(root / "recipes" / "accelerate" / "ddp.yaml"), "--num_processes", "2"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *settings, "--main_process_port", "0", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    command = [*launcher, "distill_llm", "respond", "teacher", *options, "--output-dir", "two"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kept:") == 1
    assert call(*options[2:], output="one").exit_code == 0
    shards = sorted(each.name for each in (folder / "one" / "generated").iterdir())
    assert len(shards) == 5
    for name in ("train.jsonl", "responses.json", *(f"generated/{each}" for each in shards)):
        assert (folder / "two" / name).read_bytes() == (folder / "one" / name).read_bytes()
    assert sorted(each.name for each in (folder / "two" / "generated").iterdir()) == shards
