"""Live bars in a terminal or notebook, plain lines elsewhere; neither with `distill-llm --quiet` (TQDM_DISABLE=1)."""

import os
import sys
import time
from typing import Any

from tqdm.auto import tqdm
from tqdm.std import tqdm as terminal_bar

from distill_llm.common.durations import duration

EVERY = 30.0
"""Seconds between two plain lines of the same work."""


class PlainLines(terminal_bar):
    """A bar for pipes and log files: a whole line now and then, never one that is written over.

    Work that ends within the first 30 seconds gives no line.
    """

    def __init__(self, *args: Any, **options: Any):
        self.told = time.monotonic()
        super().__init__(*args, **{**options, "mininterval": 1.0, "miniters": 1})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write a line, if the last one is long enough ago."""
        if time.monotonic() - self.told < EVERY:
            return
        self.told = time.monotonic()
        self.fp.write(f"{self._line()}\n")
        self.fp.flush()

    def clear(self, *args: Any, **options: Any) -> None:
        """Nothing: what is written stays."""

    def close(self) -> None:
        """End without another line."""
        if not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]

    def _line(self) -> str:
        facts = self.format_dict
        done, unit = facts["n"], facts["unit"].strip().replace("it", "")
        begin = f"{self.desc.removesuffix(': ') or 'progress'}: {done:,.0f}"
        words = f" {unit}" if unit else ""
        postfix = f", {facts['postfix']}" if facts["postfix"] else ""
        if not self.total:
            return f"{begin}{words}{postfix}, {duration(facts['elapsed'])} so far"
        rate = facts["rate"] or (done - self.initial) / max(facts["elapsed"], 1e-9)
        left = f", {duration((self.total - done) / rate)} left" if rate else ""
        return f"{begin} of {self.total:,.0f}{words} ({100 * done / self.total:.0f}%){postfix}{left}"


def is_live() -> bool:
    """Whether bars can be redrawn: standard error is a terminal that has a size (some containers' have none), or a notebook."""
    if any("notebook" in base.__module__ for base in tqdm.__mro__):
        return True
    return sys.stderr.isatty() and min(os.get_terminal_size(sys.stderr.fileno())) > 1


def progress_bar(*args: Any, shown: bool = True, **options: Any) -> Any:
    """A tqdm bar, or plain lines where it could not be redrawn, if it is to be shown and the environment does not forbid it.

    Args:
        args, options: of tqdm.
    """
    options["disable"] = not shown or os.environ.get("TQDM_DISABLE") == "1"
    return (tqdm if is_live() else PlainLines)(*args, **options)
