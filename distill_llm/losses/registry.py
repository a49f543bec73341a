"""Functions that objectives name: kept by name, and read from a setting."""

from collections.abc import Callable, Mapping
from typing import Any

from distill_llm.common.errors import InputError, one_of


def name_in(registered: Mapping[str, Any]) -> Callable[[Any], str]:
    """A validator of a setting that must be a name of a registry, also one that is registered later."""

    def read(given: Any) -> str:
        if isinstance(given, str) and given in registered:
            return given
        raise InputError("", given, one_of(registered, str(given)))

    return read
