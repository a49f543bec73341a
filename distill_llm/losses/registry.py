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
