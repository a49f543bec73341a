"""What a run tells while it works: by default on standard output. A program that wants it otherwise gives its own listener."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console


@dataclass(frozen=True)
class StageDone:
    """A finished stage.

    Attributes:
        name: of the stage, such as `round-1/prune`.
        result: what `state.json` keeps of it, with the `seconds` that it took.
        parts: what there is to say of it; None: nothing.
        before: whether an earlier start of the run did the work.
    """

    name: str
    result: Mapping[str, Any]
    parts: list[str] | None
    before: bool = False


class Listener:
    """Prints what a run tells."""

    def say(self, what: Any) -> None:
        """A line, or a rich table."""
        Console(soft_wrap=isinstance(what, str)).print(what, markup=False, highlight=False)

    def done(self, stage: StageDone) -> None:
        """A stage is finished."""
        if stage.parts is not None:
            self.say(f"{stage.name}: {', '.join(stage.parts)} ({stage.result['seconds']:.0f} s)")
