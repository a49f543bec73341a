"""Functions that objectives name: kept by name, and read from a setting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distill_llm.common.errors import InputError, one_of


@dataclass(frozen=True, eq=False)
class NameIn:
    """A validator of a setting that must be a name of a registry, also one that is registered later."""

    registered: Mapping[str, Any]

    def __call__(self, given: Any) -> str:
        """The name, or an InputError with those that there are."""
        if isinstance(given, str) and given in self.registered:
            return given
        raise InputError("", given, one_of(self.registered, str(given)))


def refuse_taken(known: Any, new: Any, what: str) -> None:
    """Refuse a name that something else has; a class or function that is defined again, as in a notebook, may have it.

    Args:
        known: the class or function that has the name; None: it is free.
        new: the one that is to have it.
        what: what messages call it, with the name.

    Raises:
        ValueError: the name is taken.
    """
    if known is not None and (known.__module__, known.__qualname__) != (new.__module__, new.__qualname__):
        raise ValueError(f"{what} exists already: choose another name")
