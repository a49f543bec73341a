"""YAML that people wrote: each duplicate key, syntax error or non-mapping becomes one clear line. Also `a.b=c` overrides."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from distill_llm.common.errors import InputError

DEEPEST = 50
"""Mappings and lists inside one another; recipes have about five."""
MOST_VALUES = 100_000
"""Values in a text, those behind an alias counted wherever it stands."""

_OTHER_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("binary", "omap", "pairs", "set")}


class _Loader(yaml.SafeLoader):
    """The safe loader for what JSON can hold, and dates.

    Keys must be text and stand once. `5e-5` is a number (YAML 1.1 reads it as text). What cannot be read, and what would take
    too long to build, is a `MarkedYAMLError` with its line.
    """

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """As the safe loader does it, to a limited depth: it would run out of stack, also where an alias names what holds it."""
        if self.depth > DEEPEST:
            raise _fault(f"more than {DEEPEST} lists and mappings inside one another", self.peek_event())
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The tree of the text, if it is small enough to build."""
        node = super().get_single_node()
        if node is not None:
            _check_size(node)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As the safe loader does it. A text that is not what its tag or its form says (`!!int x`, 2020-13-45) is refused."""
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, ValueError, LookupError, AttributeError):  # what it raises, by the tag
            kind = node.tag.rpartition(":")[2]
            if not isinstance(node, yaml.ScalarNode):
                raise
            raise _fault(
                f"{str(node.value)[:40]!r} is not a valid {kind}; put it in quotes if it is text", node
            ) from None
        if isinstance(value, str) and not _is_plain(value):
            raise _fault("a text with a NUL or half of a surrogate pair", node)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """As the safe loader does it, after a check that the keys of `node` are text and stand once."""
        seen: dict[str, int] = {}
        keys = [key for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []  # else it is refused below
        for key in (key for key in keys if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in seen:
                raise _fault(f"{key.value!r} also stands on line {seen[key.value]}", key)
            seen[key.value] = line
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        for key, _ in node.value:  # without those of `<<`, which is replaced by now
            if not isinstance(read := self.construct_object(key), str):
                raise _fault(
                    f"the name {key.value!r} is read as {read!r}; put it in quotes if it is meant as text", key
                )
        return mapping


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
_Loader.yaml_constructors = {tag: each for tag, each in _Loader.yaml_constructors.items() if tag not in _OTHER_TAGS}


def _fault(problem: str, place: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=place.start_mark)


def _is_plain(text: str) -> bool:
    """Whether a text can be written to a file and be part of a path."""
    return "\0" not in text and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_size(root: yaml.Node) -> None:
    """Refuse a tree that is too large or too deep once every alias is replaced by what it names, or that holds itself."""
    known: dict[yaml.Node, tuple[int, int]] = {}  # values and levels
    above: set[yaml.Node] = set()

    def size(node: yaml.Node) -> tuple[int, int]:
        if node in above:
            raise _fault("an alias that names what it is a part of", node)
        if node not in known:
            above.add(node)
            parts = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                parts = [each for pair in parts for each in pair]
            inside = [size(each) for each in parts]
            known[node] = 1 + sum(values for values, _ in inside), 1 + max((levels for _, levels in inside), default=0)
            above.remove(node)
            if known[node][0] > MOST_VALUES:
                raise _fault(f"more than {MOST_VALUES:,} values, if those behind aliases count", node)
            if known[node][1] > DEEPEST:
                raise _fault(f"more than {DEEPEST} lists and mappings inside one another", node)
        return known[node]

    size(root)


def _parse(text: str, field: str) -> Any:
    """The value of the YAML `text`. An InputError names `field` and the line of the fault."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"{field} line {mark.line + 1}" if mark and "\n" in text else field
        line = text.splitlines()[mark.line].strip() if mark and mark.line < len(text.splitlines()) else text
        raise InputError(where, line, f"valid YAML ({error.problem})") from None
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
    if not equals or not all(path.strip().split(".")):
        raise InputError("--set", text, "NAME.NAME=VALUE, for example pruning.keep=0.4")
    put(given, path.strip(), _parse(value, f"--set {path}"), ("--set", text))


def several(text: str) -> tuple[str, list[Any]]:
    """The field and its values from `a.b=c,d`; each value is YAML: `pruning.units=[heads],[heads, neurons]` has two."""
    path, equals, values = text.partition("=")
    if not equals or not values.strip() or not all(path.strip().split(".")):
        raise InputError("--over", text, "NAME.NAME=VALUE,VALUE, for example pruning.criterion=fisher,taylor")
    return path.strip(), _parse(f"[{values}]", f"--over {path}")


def put(given: dict[str, Any], path: str, value: Any, source: tuple[str, Any]) -> None:
    """Set the field `a.b` of a nested mapping, in place; missing mappings are added.

    Args:
        source: the option that names the field, and what it was given, for the message.

    Raises:
        InputError: the field would lie inside a value.
    """
    names, inner = path.split("."), given
    for depth, name in enumerate(names[:-1]):
        below = inner.get(name)
        if below is None:
            below = inner[name] = {}
        if not isinstance(below, dict):
            above = ".".join(names[: depth + 1])
            raise InputError(*source, f"a field inside a section ({above} is {below!r}, not a section)")
        inner = below
    inner[names[-1]] = value
