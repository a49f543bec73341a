"""How a command tells what it does: to people, `--quiet` (the last line alone), or `--json` (to programs).

With `--json`, standard output has one JSON object a line and nothing else; what libraries print there goes to standard error.
Every object names its `event`:

- `stage`: a stage of a run is finished: `stage` (its name), `seconds`, `before` (true: an earlier start did the work) and
  `result` (what `state.json` keeps of it, without the `history` of the losses, which `metrics.json` has).
- `end`: the command is finished, with its own fields.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, Any

import typer

from distill_llm.cli.group import is_main_process
from distill_llm.cli.libraries import is_quiet, subdued
from distill_llm.pipeline.listener import Listener, StageDone

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and the last line alone.")]
AsJson = Annotated[
    bool,
    typer.Option("--json", help="Print a JSON object for each stage and one at the end, each on a line, and no text."),
]


class Teller(Listener):
    """Tells people everything: each line and table on the way, each finished stage, and how it ended."""

    def say(self, what: Any) -> None:
        """A line or a table on the way, from the first process."""
        if is_main_process():
            super().say(what)

    def end(self, line: str, **fields: Any) -> None:
        """The command is finished.

        Args:
            line: the last one, for people in a hurry.
            fields: the same for programs.
        """
        Teller.say(self, line)


class QuietTeller(Teller):
    """Tells the last line alone."""

    def say(self, what: Any) -> None:
        """Nothing."""

    def done(self, stage: StageDone) -> None:
        """Nothing."""


class JsonTeller(QuietTeller):
    """Tells programs: an object a line, on what was standard output when it was made."""

    def __init__(self) -> None:
        self.out = sys.stdout

    def done(self, stage: StageDone) -> None:
        """A line for the stage."""
        result = dict(stage.result)
        seconds, _ = result.pop("seconds"), result.pop("history", None)
        self.tell("stage", stage=stage.name, seconds=seconds, before=stage.before, result=result)

    def end(self, line: str, **fields: Any) -> None:
        """A line with the fields."""
        self.tell("end", **fields)

    def tell(self, event: str, **fields: Any) -> None:
        """A line of any event."""
        if is_main_process():
            self.out.write(json.dumps({"event": event, **fields}, default=str) + "\n")
            self.out.flush()


@contextmanager
def telling(quiet: bool = False, as_json: bool = False) -> Iterator[Teller]:
    """What a command tells with, as its options say. `distill-llm --quiet COMMAND` is the same as the command's own."""
    quiet = quiet or is_quiet()
    with subdued(quiet):
        if not as_json:
            yield QuietTeller() if quiet else Teller()
            return
        teller = JsonTeller()
        with redirect_stdout(sys.stderr):
            yield teller
