"""Collecting faults: a door checks all that it can, then raises all faults together."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from distill_llm.common.errors import InputError, faults_in, first_line

T = TypeVar("T")


class Collector:
    """Runs checks and keeps their faults."""

    def __init__(self) -> None:
        self.faults: list[InputError] = []

    def run(self, check: Callable[..., T], *args: Any) -> T | None:
        """The check's result. None if it raised an InputError, or if an input is None, since its fault is already kept."""
        if any(arg is None for arg in args):
            return None
        try:
            return check(*args)
        except InputError as error:
            self.faults += faults_in(error)
            return None

    def ask(self, rule: Callable[..., Iterable[InputError]], *facts: Any) -> None:
        """Keep the faults that a rule finds. A rule is skipped if one of its facts is None."""
        self.faults += self.run(rule, *facts) or ()


@contextmanager
def in_one_line(field: str, given: Any, wanted: str) -> Iterator[None]:
    """Turn whatever a library raises into one InputError with the first line of its text.

    Args:
        field, given: what the library was given.
        wanted: what would be accepted.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # pyarrow, datasets, huggingface_hub, json and models' code raise errors of many kinds
        raise InputError(field, given, f"{wanted} ({first_line(error)})") from error
