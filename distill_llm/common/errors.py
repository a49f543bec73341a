"""The one exception for bad input: a single line with the field, what was given, and what is accepted or what to do."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

LONGEST_SHOWN = 160
"""Characters of a given value that a message shows."""


class InputError(ValueError):
    """Bad input from a user: shown as one line without a traceback, exit code 2 on the command line.

    The line says what was given and then either which values are accepted or what to do.

    Args:
        field: the name of the field or argument, as the user wrote it (`pruning.keep`, `--task`).
        given: the value that was given.
        accepted: which values are accepted: "a number above 0 and at most 1".
        fix: what to do, where no other value would help: "remove it: jsd does not use it".
    """

    def __init__(self, field: str, given: Any, accepted: str = "", *, fix: str = ""):
        self.field, self.given, self.accepted, self.fix = field, given, accepted, fix
        super().__init__(f"{field}: got {_shown(given)}; {fix or f'accepted: {accepted}'}")

    def renamed(self, field: str) -> "InputError":
        """The same fault under the name that the caller's user knows the field by."""
        return InputError(field, self.given, self.accepted, fix=self.fix)


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= LONGEST_SHOWN else f"{text[: LONGEST_SHOWN - 4]} ..."


def one_of(names: Iterable[str], given: str = "") -> str:
    """The words for 'one of these names', with the nearest to `given` first as a suggestion."""
    names = list(names)
    near = get_close_matches(given, names, n=1)
    return (f"{near[0]!r} (the nearest), or " if near else "") + "one of " + ", ".join(names)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough for one line of output."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class InputErrors(InputError):
    """Several faults of one input: `faults` in the order found, the text one line each."""

    def __init__(self, faults: Iterable[InputError]):
        self.faults = list(faults)
        first = self.faults[0]
        super().__init__(first.field, first.given, first.accepted, fix=first.fix)
        self.args = ("\n".join(map(str, self.faults)),)


def faults_in(error: InputError) -> list[InputError]:
    """The faults of an error, one or several."""
    return error.faults if isinstance(error, InputErrors) else [error]


def raise_all(faults: list[InputError]) -> None:
    """Raise InputErrors where there are faults."""
    if faults:
        raise InputErrors(faults)
