"""YAML that people wrote: each duplicate key, syntax error or non-mapping becomes one clear line. Also `a.b=c` overrides."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from distill_llm.common.errors import InputError


class _Loader(yaml.SafeLoader):
    """The safe loader, but duplicate keys are refused, and `5e-5` is a number (YAML 1.1 reads it as text)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the safe loader does it, after a check that no key of `node` stands twice."""
        seen: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} also stands on line {seen[key.value]}", problem_mark=key.start_mark
                )
            seen[key.value] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str, field: str) -> Any:
    """The value of the YAML `text`. An InputError names `field` and the line of the fault."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{field} line {mark.line + 1}" if mark and "\n" in text else field
        line = text.splitlines()[mark.line].strip() if mark and mark.line < len(text.splitlines()) else text
        raise InputError(where, line, f"valid YAML without duplicate keys ({error.problem})") from None
    except yaml.YAMLError as error:
        raise InputError(field, text[:40], f"valid YAML ({str(error).splitlines()[0]})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; InputError if the file cannot be read or holds something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("RECIPE", str(path), f"a readable UTF-8 text file ({type(error).__name__})") from None
    given = _parse(text, str(path))
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise InputError(str(path), type(given).__name__, "a mapping of sections: teacher, data, pruning, ...")
    return given


def read_mapping(text: str | None, field: str) -> dict[str, Any]:
    """The mapping that an option holds as YAML; empty for None. InputError, naming `field`, if it is no mapping."""
    given = {} if text is None else _parse(text, field)
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given):
        raise InputError(field, text, "a mapping of names to values: '{NAME: VALUE}'")
    return given


def override(given: dict[str, Any], text: str) -> None:
    """Set a value in a nested mapping, in place, from `a.b=c` (c is YAML); missing mappings are added."""
    path, equals, value = text.partition("=")
    names = path.strip().split(".")
    if not equals or not all(names):
        raise InputError("--set", text, "NAME.NAME=VALUE, for example pruning.keep=0.4")
    inner = given
    for depth, name in enumerate(names[:-1]):
        below = inner.get(name)
        if below is None:
            below = inner[name] = {}
        if not isinstance(below, dict):
            raise InputError(
                "--set", text, f"a field inside a section ({'.'.join(names[: depth + 1])} is {below!r}, not a section)"
            )
        inner = below
    inner[names[-1]] = _parse(value, f"--set {path}")
