"""The one exception for bad input: a single line with the field, what was given, and what is accepted or what to do."""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from distill_llm.common.secrets import hidden

LONGEST_LINE = 300
"""Characters of a message."""
LONGEST_SHOWN, LONGEST_FIELD, LEAST_SHOWN = 160, 80, 60
"""Most characters of a given value and of a field's name in a message, and of a value where the rest is long."""
LONGEST_LIST = 100
"""Characters of a list of accepted names."""


class InputError(ValueError):
    """Bad input from a user: shown as one line without a traceback, exit code 2 on the command line.

    The line says what was given and then either which values are accepted or what to do. It shows no access token.

    Args:
        field: the name of the field or argument, as the user wrote it (`pruning.keep`, `--task`).
        given: the value that was given; None is shown as "not given".
        accepted: which values are accepted: "a number above 0 and at most 1".
        fix: what to do, where no other value would help: "remove it: jsd does not use it".
    """

    def __init__(self, field: str, given: Any, accepted: str = "", *, fix: str = ""):
        self.field, self.given, self.accepted, self.fix = field, given, accepted, fix
        name, rest = (
            _both_ends(hidden(" ".join(field.split())), LONGEST_FIELD),
            hidden(" ".join((fix or f"accepted: {accepted}").split())),
        )
        room = LONGEST_LINE - len(name) - len(": got ; ") - len(rest)
        shown = _both_ends(hidden(repr(given)), min(LONGEST_SHOWN, max(LEAST_SHOWN, room)))
        super().__init__(cut(f"{name}: {'not given' if given is None else f'got {shown}'}; {rest}"))

    def renamed(self, field: str) -> "InputError":
        """The same fault under the name that the caller's user knows the field by."""
        return InputError(field, self.given, self.accepted, fix=self.fix)


def cut(text: str, longest: int = LONGEST_LINE) -> str:
    """A text of at most so many characters; one that is cut ends with ` ...`."""
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def _both_ends(text: str, longest: int) -> str:
    """A text of at most so many characters, cut in the middle: the end of a path says more than its folders."""
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def one_of(names: Iterable[str], given: str = "") -> str:
    """The words for 'one of these names', with the nearest to `given` first as a suggestion; of many names the first ones."""
    names = list(names)
    near = get_close_matches(given, names, n=1)
    shown, length = 0, 0
    while shown < len(names) and (length := length + len(names[shown]) + 2) <= LONGEST_LIST:
        shown += 1
    more = f", ... ({len(names)} in all)" if shown < len(names) else ""
    return (f"{near[0]!r} (the nearest), or " if near else "") + "one of " + ", ".join(names[:shown]) + more


def first_line(error: BaseException) -> str:
    """The first line of an error's text, short enough for one line of output, without tokens."""
    return (hidden(str(error)).strip().splitlines() or [type(error).__name__])[0][:200]


class InputErrors(InputError):
    """Several faults of one input: `faults` in the order found, the text one line each."""

    def __init__(self, faults: Iterable[InputError]):
        self.faults = list(faults)
        first = self.faults[0]
        super().__init__(first.field, first.given, first.accepted, fix=first.fix)
        self.args = ("\n".join(map(str, self.faults)),)


def as_arguments(error: InputError, sections: Iterable[str]) -> InputErrors:
    """The same faults for a caller in Python, whose arguments have no section of a recipe before them: `path` for `data.path`."""
    begins = tuple(f"{section}." for section in sections)

    def short(name: str) -> str:
        return next((name.removeprefix(begin) for begin in begins if name.startswith(begin)), name)

    def text(words: str) -> str:
        return re.sub(r"`([\w.]+)`", lambda match: f"`{short(match[1])}`", words)

    return InputErrors(
        InputError(short(fault.field), fault.given, text(fault.accepted), fix=text(fault.fix))
        for fault in faults_in(error)
    )


def faults_in(error: InputError) -> list[InputError]:
    """The faults of an error, one or several."""
    return error.faults if isinstance(error, InputErrors) else [error]


def raise_all(faults: list[InputError]) -> None:
    """Raise InputErrors where there are faults."""
    if faults:
        raise InputErrors(faults)
