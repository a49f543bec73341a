"""Write docs/reference/recipe.md from the recipe's sections: `python scripts/docs/recipe_reference.py` (or `make docs`)."""

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from distill_llm.losses.objective import Objective, sections
from distill_llm.losses.registry import NameIn
from distill_llm.losses.schedules import Schedule
from distill_llm.recipe.recipe import Recipe

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "recipe.md"
HEAD = """# Every field of a recipe

This page is made from the code by `make docs`. [The guide](../guide/recipes.md) explains how the sections work together.

`teacher.train`, `distillation` and `final` also take any field of transformers' `TrainingArguments`, and `on_nonfinite`: what
to do with a step whose loss or gradient is nan or infinite. `stop` (the default) ends the run in one line that names the
term, the layer and the step; `skip` leaves the step out and counts it in the log (`skipped_steps`), and still ends the run after
ten in a row or where no step was kept. DeepSpeed takes its steps too early to skip them.
"""


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models in a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in sections_in(part)]


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a section; those of the objective are the registered terms."""
    if section is not Objective:
        return section.model_fields
    return {name: FieldInfo.from_annotated_attribute(inner, None) for name, inner in sections().items()}


def value_of(field: FieldInfo) -> str:
    """What a field takes, in words."""
    named = [rule.func.registered for rule in field.metadata if isinstance(getattr(rule, "func", None), NameIn)]
    return ", ".join(f"`{name}`" for name in named[0]) if named else words(field.annotation)


def words(annotation: Any) -> str:
    """A type in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation is type(None):
        return ""
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(filter(None, map(words, parts))))
    if origin is list:
        return f"list of {words(parts[0])}"
    if origin is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return words(parts[0])
    names = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
    if annotation in names:
        return names[annotation]
    return "mapping" if sections_in(annotation) else getattr(annotation, "__name__", str(annotation)).lower()


def default_of(field: FieldInfo) -> str:
    """A default as YAML, or `required`."""
    if field.is_required():
        return "required"
    value = field.default if field.default is not PydanticUndefined else field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel) or value in ({}, ""):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`[{', '.join(map(str, value))}]`" if isinstance(value, list | tuple) else f"`{value}`"


def table(section: type[BaseModel]) -> list[str]:
    """The plain fields of a section."""
    rows = ["| field | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in fields_of(section).items():
        inner = sections_in(field.annotation)
        meaning = field.description or (summary(inner[0]) if inner else "")
        meaning = " ".join(meaning.split()).replace("|", "\\|")
        rows.append(f"| `{name}` | {value_of(field)} | {default_of(field)} | {meaning} |")
    return rows


def summary(section: type[BaseModel]) -> str:
    """What a section is: the first paragraph of its docstring."""
    return " ".join((section.__doc__ or "").split("\n\n")[0].split())


def described(path: str, section: type[BaseModel]) -> list[str]:
    """A section's heading, meaning and fields, then the sections within it; schedules have one place at the end."""
    lines = ["", f"## `{path}`", "", summary(section), "", *table(section)]
    for name, field in fields_of(section).items():
        for inner in sections_in(field.annotation)[:1]:
            if inner is not Schedule:
                lines += described(f"{path}.{name}", inner)
    return lines


def render() -> str:
    """The page."""
    top = {name: field for name, field in Recipe.model_fields.items() if not sections_in(field.annotation)}
    lines = ["", "## Top level", "", "| field | value | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in top.items():
        lines.append(f"| `{name}` | {words(field.annotation)} | {default_of(field)} | {field.description} |")
    for name, field in Recipe.model_fields.items():
        if name not in top:
            lines += described(name, sections_in(field.annotation)[0])
    lines += ["", "## Schedules", "", "A `weight` or `temperature` may be a number that changes during training:", ""]
    lines += [summary(Schedule), "", *table(Schedule)]
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(render())
