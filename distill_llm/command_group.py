"""How the command line answers faults of the input: a line each on stderr, and exit code 2."""

import os
import sys
from typing import Any

import typer

from distill_llm.errors import InputError
from distill_llm.faults import faults_in

_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class CommandGroup(typer.core.TyperGroup):
    """Turns faults of the input into lines on stderr and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except InputError as error:
            lines = [str(fault) for fault in faults_in(error)]
        except _UsageError as error:
            lines = [error.format_message() + _hint(error)]  # type: ignore[attr-defined]
        if is_main_process():
            for line in lines:
                print("error:", " ".join(line.split()), file=sys.stderr)
        raise typer.Exit(2)


def _hint(error: Any) -> str:
    """What to write where `--set` and its value were taken for two arguments."""
    settings = (error.ctx.params.get("settings") if error.ctx is not None else None) or []
    bare = next((text for text in settings if "=" not in text), None)
    return f" (--set takes one argument: --set {bare}=VALUE)" if bare else ""


def is_main_process() -> bool:
    """Whether this process prints: the first of several."""
    return os.environ.get("RANK", "0") == "0"
