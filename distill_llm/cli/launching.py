"""`--accelerate`: the same command again, on several processes of this machine, as `accelerate launch` starts them."""

import logging
import os
from collections.abc import Callable
from functools import wraps
from inspect import Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from distill_llm.cli.group import arguments_of
from distill_llm.common.errors import InputError, one_of
from distill_llm.recipe.recipe import recipe_folder

Accelerate = Annotated[
    str | None,
    typer.Option(
        metavar="ddp|fsdp2|zero3", help="Work on several processes, by default one for each GPU of this machine."
    ),
]
Processes = Annotated[int | None, typer.Option(min=2, help="Number of processes, with --accelerate.")]

WITHOUT_GPUS = 2
"""Processes on a machine without GPUs."""


def configurations() -> dict[str, Path]:
    """The launch configurations of accelerate that are shipped, by name."""
    return {path.stem: path for path in sorted((recipe_folder() / "accelerate").glob("*.yaml"))}


def shareable(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options that let several processes share its work."""

    @wraps(command, assigned=("__module__", "__name__", "__qualname__", "__doc__"))
    def started(
        context: typer.Context, accelerate: Accelerate = None, processes: Processes = None, **given: Any
    ) -> None:
        if accelerate is not None and not given.get("dry_run"):
            _on_processes(arguments_of(context), accelerate, processes)
        elif processes is not None:
            raise InputError("--processes", processes, fix="add --accelerate, which says how they share the work")
        else:
            command(**given)

    own = signature(command).parameters
    first, *options, _ = signature(started, follow_wrapped=False).parameters.values()
    started.__signature__ = Signature([first, *own.values(), *options])  # type: ignore[attr-defined]
    started.__annotations__ = {each.name: each.annotation for each in (first, *own.values(), *options)}
    return started


def _on_processes(arguments: list[str], name: str, processes: int | None) -> None:
    """Carry out a command on several processes.

    Args:
        arguments: of the command line.
        name: of a launch configuration.
        processes: how many; None: one for each GPU.

    Raises:
        InputError: this machine cannot do that.
        typer.Exit: a process failed; with its exit code.
    """
    file = _configuration(name)
    import torch

    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if not gpus and name != "ddp":
        fix = "take ddp: accelerate divides a model among GPUs only, and this machine has none"
        raise InputError("--accelerate", name, fix=fix)
    if gpus == 1:
        raise InputError("--accelerate", name, fix="leave it out: this machine has one GPU")
    most = gpus or os.cpu_count() or 1
    if processes is not None and processes > most:
        raise InputError("--processes", processes, f"at most {most}, the {'GPUs' if gpus else 'cores'} of this machine")
    _launch(file, processes or gpus or WITHOUT_GPUS, _without_own(arguments))


def _configuration(name: str) -> Path:
    from importlib.util import find_spec

    known = configurations()
    if name not in known:
        raise InputError("--accelerate", name, one_of(known, name))
    if "RANK" in os.environ:
        fix = "leave it out: `accelerate launch` has started this process already"
        raise InputError("--accelerate", name, fix=fix)
    if name.startswith("zero") and find_spec("deepspeed") is None:
        raise InputError("--accelerate", name, fix="install deepspeed, or take fsdp2, which divides the same things")
    return known[name]


def _launch(file: Path, processes: int, arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # Port 0: a free one, so that two commands can run at once.
    line = ["--config_file", str(file), "--num_processes", str(processes), "--main_process_port", "0"]
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the process has said what is wrong
    try:
        launch_command(launch_command_parser().parse_args([*line, "-m", "distill_llm", *arguments]))
    except SignalException:  # Ctrl-C, which the processes got too: the first one has said how to go on
        raise typer.Exit(130) from None
    except ChildFailedError as error:
        raise typer.Exit(abs(error.get_first_failure()[1].exitcode)) from None


def _without_own(arguments: list[str]) -> list[str]:
    """The words of a command line without these options and their values."""
    own, kept, words = ("--accelerate", "--processes"), [], iter(arguments)
    for word in words:
        if word in own:
            next(words, None)
        elif word.partition("=")[0] not in own:
            kept.append(word)
    return kept
