"""How the command line answers faults of the input: a line each on stderr, and exit code 2."""

import os
import sys
from typing import Any

import typer

from distill_llm.common.errors import InputError, faults_in

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]
_NoArguments = next(kind for kind in _UsageError.__subclasses__() if kind.__name__ == "NoArgsIsHelpError")


class CommandGroup(typer.core.TyperGroup):
    """Turns faults of the input into lines on stderr and exit code 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
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
        _leave_processes()
        return result


def _leave_processes() -> None:
    """End what `accelerate launch` began: the threads of a group that is left open abort the process now and then. Only
    after success: to end it may wait for the other processes, which need not have met the same error."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _told(lines: list[str]) -> typer.Exit:
    if is_main_process():
        for line in lines:
            print("error:", " ".join(line.split()), file=sys.stderr)
    return typer.Exit(2)


def _hint(error: Any) -> str:
    """What to write where `--set` and its value were taken for two arguments."""
    settings = (error.ctx.params.get("settings") if error.ctx is not None else None) or []
    bare = next((text for text in settings if "=" not in text), None)
    return f" (--set takes one argument: --set {bare}=VALUE)" if bare else ""


def is_main_process() -> bool:
    """Whether this process prints: the first of several."""
    return os.environ.get("RANK", "0") == "0"
