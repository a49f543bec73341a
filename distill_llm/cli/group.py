"""How the command line reports bad input: a line on stderr for each fault, and exit code 2."""

import os
import signal
import sys
from typing import Any

import typer

from distill_llm.common.errors import InputError, faults_in

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_NoArguments = next(kind for kind in _UsageError.__subclasses__() if kind.__name__ == "NoArgsIsHelpError")


ARGUMENTS = "distill_llm.arguments"
RESUMABLE = ("run", "distill", "shrink", "sweep", "cache", "respond")
"""Commands that, given again, go on where they were stopped."""


class CommandGroup(typer.core.TyperGroup):
    """Turns bad input into lines on stderr and exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)
        try:
            return super().parse_args(ctx, args)
        except _NoArguments:
            raise
        except _UsageError as error:
            raise _told([error.format_message()]) from None  # type: ignore[attr-defined]

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
        except InputError as error:
            raise _told([str(fault) for fault in faults_in(error)]) from None
        except _UsageError as error:
            raise _told([error.format_message() + _hint(error)]) from None  # type: ignore[attr-defined]
        except KeyboardInterrupt:
            raise _stopped(ctx) from None
        except OSError as error:
            if error.filename is None:  # not about a file: a fault of the program
                raise
            line = f"{error.filename}: {error.strerror or error}; mend that, then run the same command again"
            _print_error(line)  # from every process: others may not meet it
            raise typer.Exit(2) from None
        _leave_processes()
        return result


def _leave_processes() -> None:
    """Close the process group that `accelerate launch` opened: left open, its threads abort the process now and then.

    Only after success: closing may wait for the other processes, which need not have met the same error.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _stopped(ctx: Any) -> typer.Exit:
    """Ctrl-C: what is done is on the disk, whole; say how to go on.

    From here on the process only ends: another Ctrl-C would break into what Python does at exit, with a traceback.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    how = ": the same command again goes on from the last finished stage or checkpoint"
    if is_main_process():
        _print_line(f"stopped{how if ctx.invoked_subcommand in RESUMABLE else ''}")
    return typer.Exit(130)


def _told(lines: list[str]) -> typer.Exit:
    if is_main_process():
        for line in lines:
            _print_error(line)
    return typer.Exit(2)


def _print_error(line: str) -> None:
    _print_line(f"error: {' '.join(line.split())}")


def _print_line(line: str) -> None:
    """Print one line on stderr, below the progress bars that were left open."""
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()
    print(line, file=sys.stderr)


def _hint(error: Any) -> str:
    """What to write if the shell passed `--set` and its value as two arguments."""
    settings = (error.ctx.params.get("settings") if error.ctx is not None else None) or []
    bare = next((text for text in settings if "=" not in text), None)
    return f" (--set takes one argument: --set {bare}=VALUE)" if bare else ""


def arguments_of(context: typer.Context) -> list[str]:
    """The words behind `distill-llm` on the command line."""
    return context.meta[ARGUMENTS]


def is_main_process() -> bool:
    """Whether this is the first process, the one that prints."""
    return os.environ.get("RANK", "0") == "0"
