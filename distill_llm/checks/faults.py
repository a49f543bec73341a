"""How a door goes on after a fault: all that can be checked is checked, and the faults are raised together."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from distill_llm.common.errors import InputError, faults_in, first_line

T = TypeVar("T")


class Collector:
    """Keeps the faults of all checks."""

    def __init__(self) -> None:
        self.faults: list[InputError] = []

    def run(self, check: Callable[..., T], *args: Any) -> T | None:
        """The check's result; None where it raised an InputError, or where an input is None (its own fault is known already)."""
        if any(arg is None for arg in args):
            return None
        try:
            return check(*args)
        except InputError as error:
            self.faults += faults_in(error)
            return None

    def ask(self, rule: Callable[..., Iterable[InputError]], *facts: Any) -> None:
        """Keep the faults that a rule finds in facts; none of them is None, or the rule is not asked."""
        self.faults += self.run(rule, *facts) or ()


@contextmanager
def in_one_line(field: str, given: Any, wanted: str) -> Iterator[None]:
    """What a library raises while it opens something, as one InputError with the first line of its text.

    Args:
        field, given: what the library was given.
        wanted: what would have been accepted.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pyarrow, datasets, huggingface_hub, json and the models' code raise what they like
        raise InputError(field, given, f"{wanted} ({first_line(error)})") from error
