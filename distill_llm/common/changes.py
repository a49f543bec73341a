"""What changed between two sets of settings, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

from distill_llm.common.errors import cut

SHOWN, LONGEST_VALUE = 3, 30
"""How many settings a line names, and characters of a value."""


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """The settings that changed, as `final.max_steps: 20 -> 3`; empty where none did.

    Args:
        before, after: settings, perhaps in sections; a setting that is missing is shown as `nothing`.
    """
    lines = list(_differences(before, after, ""))
    more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more


def _differences(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from _differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}: {_shown(old)} -> {_shown(new)}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else cut(str(value), LONGEST_VALUE)
