"""Pydantic's validation errors as lines to read: dotted field, what was given, what is accepted, the nearest name."""

import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distill_llm.common.errors import InputError, faults_in, one_of


class _Nothing:
    """What was given where a required field is missing."""

    def __repr__(self) -> str:
        return "nothing"


def faults_of(error: ValidationError, model: type[BaseModel]) -> list[InputError]:
    """One InputError per field at fault of a failed validation of `model`.

    The alternatives of a union, which pydantic reports one by one, become one line.
    """
    accepted: dict[str, list[str]] = {}
    given: dict[str, Any] = {}
    fixes: list[InputError] = []
    for details in error.errors():
        names, within, owner, info = _place(details["loc"], model)
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            inner = [(fault, [*names, fault.field]) for fault in faults_in(cause)]
            fixes += [fault.renamed(".".join(filter(None, path))) for fault, path in inner if fault.fix]
            found = [(path, fault.given, fault.accepted) for fault, path in inner if not fault.fix]
        elif details["type"] == "missing":
            found = [(names, _Nothing(), _meaning(info))]
        else:
            words = _accepted(details, owner, info)
            found = [(names, details["input"], f"in a list, {words} at {'.'.join(within)}" if within else words)]
        for path, value, words in found:
            field = ".".join(filter(None, path))
            given.setdefault(field, value)
            if words not in accepted.setdefault(field, []):
                accepted[field].append(words)
    return [InputError(field, given[field], " or ".join(words)) for field, words in accepted.items()] + fixes


def _place(
    loc: tuple[int | str, ...], model: type[BaseModel]
) -> tuple[list[str], list[str], type[BaseModel], FieldInfo | None]:
    """Where a fault is: the names on the way to it, the indices inside a member of a union, its model and its field.

    Pydantic puts a tag such as `list[int]` for a member of a union into the location; it is in neither list.
    """
    names: list[str] = []
    within: list[str] = []
    in_union = False
    owner, inner, info = model, [model], None
    for part in loc:
        fields = {name: (m, f) for m in inner for name, f in m.model_fields.items()}
        if part in fields:
            owner, info = fields[str(part)]
            inner = _models(info.annotation)
            names.append(str(part))
        elif in_union:
            within.append(str(part))
        elif isinstance(part, str) and "[" in part:
            in_union = True
        else:
            owner = inner[0] if inner and isinstance(part, str) else owner
            names.append(str(part))
    return names, within, owner, info


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Pydantic models anywhere inside a type annotation."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models(part)]


def _meaning(info: FieldInfo | None) -> str:
    """What a required field is, from its description or its own fields."""
    if info is None:
        return "a value"
    models = _models(info.annotation)
    described = info.description or (f"a mapping with {', '.join(models[0].model_fields)}" if models else "a value")
    return f"{described} (required)"


def _accepted(details: ErrorDetails, owner: type[BaseModel], info: FieldInfo | None) -> str:
    """The words for what a field accepts, of a pydantic error."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "invalid_key":
        return "a name that is text"
    if kind == "extra_forbidden":
        return one_of(owner.model_fields, str(details["loc"][-1]))
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", str(context["expected"])) or [str(context["expected"])]  # texts, or numbers
        if names == [context["expected"]]:
            return names[0]
        return one_of(names, str(details["input"])) if len(names) > 1 else repr(names[0])
    if kind.startswith(("model_", "dict_", "mapping_")):
        models = _models(info.annotation) if info else []
        return f"a mapping with {', '.join(models[0].model_fields)}" if models else "a mapping of names to values"
    for start, noun in (("int", "a whole number"), ("float", "a number"), ("bool", "true or false")):
        if kind.startswith(start + "_"):
            return noun + _bounds(info)
    if kind in ("greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"):
        whole = info is not None and int in (info.annotation, *get_args(info.annotation))
        return ("a whole number" if whole else "a number") + _bounds(info)
    if kind.startswith(("string_", "path_", "list_", "too_", "tuple_")):
        noun = {"string": "text", "path": "a path"}.get(kind.split("_")[0], "a list")
        return f"{noun} ({info.description})" if info is not None and info.description else noun
    return details["msg"].removeprefix("Value error, ")


def _bounds(info: FieldInfo | None) -> str:
    """The bounds of a number's field in words: ` above 0 and at most 1`."""
    words = []
    for bound in info.metadata if info is not None else []:
        for name, word in (("gt", "above"), ("ge", "of at least"), ("lt", "below"), ("le", "at most")):
            if getattr(bound, name, None) is not None:
                words.append(f"{word} {getattr(bound, name)}")
    return " " + " and ".join(words) if words else ""
