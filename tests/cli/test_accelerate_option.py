"""`--accelerate NAME`: the same command on several processes, and what a machine cannot do."""

import importlib.util

import pytest
import torch
from accelerate.commands import launch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from typer.testing import CliRunner

from distill_llm.cli.launching import configurations
from distill_llm.cli.main import app
from distill_llm.recipe.recipe import recipe_folder

RUN = ["--quiet", "run", "quickstart", "--set", "seed=3"]


@pytest.fixture
def launched(monkeypatch):
    """What accelerate was asked to launch, in the place of a launch."""
    seen: list = []
    monkeypatch.setattr(launch, "launch_command", seen.append)
    monkeypatch.delenv("RANK", raising=False)
    return seen


def gpus(monkeypatch, count):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def said(*arguments):
    """The exit code, and the lines on stderr."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    "given",
    [
        ["--accelerate", "fsdp2", "--processes", "3"],
        ["--processes=3", "--accelerate=fsdp2"],
    ],
)
def test_the_command_is_launched_without_the_options_that_launch_it(launched, monkeypatch, given):
    gpus(monkeypatch, 4)
    assert said(*RUN, *given, "--output-dir", "there")[0] == 0
    (request,) = launched
    assert request.config_file == str(recipe_folder() / "accelerate" / "fsdp2.yaml")
    assert request.num_processes == 3 and request.main_process_port == 0
    assert request.module and request.training_script == "distill_llm"
    assert request.training_script_args == [*RUN, "--output-dir", "there"]


@pytest.mark.parametrize("command", ["run", "distill", "prune", "cache", "respond"])
def test_every_command_that_can_share_its_work_takes_it(launched, monkeypatch, command):
    gpus(monkeypatch, 0)
    needed = {
        "prune": ["--task", "sst2", "--keep", "0.5", "--output-dir", "o"],
        "cache": ["--output-dir", "o"],
        "respond": ["--data", "d", "--output-dir", "o"],
    }
    line = [command, "model", *needed.get(command, [])]
    assert said(*line, "--accelerate", "ddp") == (0, "")
    assert launched[0].num_processes == 2 and launched[0].training_script_args == line


def test_each_gpu_gets_a_process(launched, monkeypatch):
    gpus(monkeypatch, 5)
    said(*RUN, "--accelerate", "ddp")
    assert launched[0].num_processes == 5


@pytest.mark.parametrize(
    ("given", "count", "line"),
    [
        (
            ["--accelerate", "fsdp"],
            4,
            "--accelerate: got 'fsdp'; accepted: 'fsdp2' (the nearest), or one of ddp, fsdp2, zero3",
        ),
        (["--processes", "2"], 4, "--processes: got 2; add --accelerate, which says how they share the work"),
        (
            ["--accelerate", "fsdp2"],
            0,
            "--accelerate: got 'fsdp2'; take ddp: accelerate divides a model among GPUs only",
        ),
        (["--accelerate", "ddp"], 1, "--accelerate: got 'ddp'; leave it out: this machine has one GPU"),
        (
            ["--accelerate", "ddp", "--processes", "4"],
            3,
            "--processes: got 4; accepted: at most 3, the GPUs of this machine",
        ),
        (["--accelerate", "zero3"], 4, "--accelerate: got 'zero3'; install deepspeed, or take fsdp2"),
    ],
)
def test_what_cannot_be_is_said_in_one_line_before_anything_starts(launched, monkeypatch, given, count, line):
    gpus(monkeypatch, count)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, errors = said(*RUN, *given)
    assert code == 2 and not launched
    assert errors.startswith(f"error: {line}") and errors.count("\n") == 1


def test_a_launched_process_is_not_launched_again(launched, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    code, errors = said(*RUN, "--accelerate", "ddp")
    assert code == 2 and not launched
    assert errors.startswith("error: --accelerate: got 'ddp'; leave it out: `accelerate launch` has started")


def test_a_failed_process_gives_its_exit_code(monkeypatch, tmp_path):
    def fail(request):
        file = tmp_path / "error.json"
        raise ChildFailedError("distill_llm", {0: ProcessFailure(0, 1, 2, str(file)), 1: ProcessFailure(1, 2, -15, "")})

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(launch, "launch_command", fail)
    gpus(monkeypatch, 2)
    assert said(*RUN, "--accelerate", "ddp")[0] == 2


def test_the_names_are_those_of_the_shipped_files():
    assert list(configurations()) == ["ddp", "fsdp2", "zero3"]
