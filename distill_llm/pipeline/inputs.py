"""What a run is made from: fingerprints of its models and rows, so that a run never goes on with others."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset

from distill_llm.checks.calibration import FIELD as CALIBRATION
from distill_llm.checks.recipe import Opened
from distill_llm.common.errors import InputError
from distill_llm.common.seals import differences
from distill_llm.data.fingerprints import rows_fingerprint
from distill_llm.models.finding import OpenModel
from distill_llm.models.fingerprints import checkpoint_identity

Inputs = Mapping[str, Any]
"""By field of the recipe: of a model its seal or its revision on the Hub, of data a hash of each split, of a source of
calibration rows or a cache a hash."""


def inputs_of(opened: Opened, known: Inputs | None = None) -> dict[str, Any]:
    """The fingerprints of all that a recipe names.

    Models in folders cost about a second per GB where they have to be read, rows about one per 100 MB.

    Args:
        known: those of an earlier start, which save reading large files that were not touched since.
    """
    models: list[OpenModel | None] = [
        opened.teacher,
        opened.student,
        opened.masked_lm,
        *opened.others,
        *opened.peers,
        *opened.stages,
    ]
    found: dict[str, Any] = {
        model.field: checkpoint_identity(model.path, model.config, (known or {}).get(model.field))
        for model in models
        if model
    }
    data, splits = opened.data, ("train", "validation", "test")
    found["data.path"] = {name: rows_fingerprint(rows) for name in splits if (rows := getattr(data, name)) is not None}
    found |= {f"{field}.path": rows_fingerprint(rows) for field, rows in calibration_rows(opened).items()}
    if opened.cache is not None:
        found["teacher.cache"] = opened.cache.index.digest
    return found


def calibration_rows(opened: Opened) -> dict[str, Dataset]:
    """The calibration rows of each source that the recipe names, by its field. Those of the training rows are left out."""
    section = opened.recipe.pruning
    if opened.calibration is None or section is None:
        return {}
    both = zip(section.calibration or (), opened.calibration.sources, strict=True)
    return {f"{CALIBRATION}.{i}": rows for i, (source, (rows, _)) in enumerate(both) if source.path is not None}


def changes(before: Inputs, now: Inputs, recipe: Mapping[str, Any]) -> list[InputError]:
    """A fault for every input that is not what it was when the run began.

    Args:
        before, now: of the first start and of this one.
        recipe: the resolved recipe.
    """
    faults = []
    for field in now:
        if words := _words(field, before.get(field), now[field]):
            given = _given(recipe, field.split("."))
            fix = f"use another output_dir, or put back what it was where you can: {words} since this run began"
            faults.append(InputError(field, given, fix=fix))
    return faults


def _given(section: Any, names: list[str]) -> Any:
    """What a section says under a path of names: sections of sections, places of a list, keys that may have dots."""
    if isinstance(section, Mapping) and (key := ".".join(names)) in section:
        return section[key]
    name, *rest = names
    if not rest:
        return section.get(name) or section.get("task")
    return _given(section[int(name)] if isinstance(section, list) else section[name] or {}, rest)


def _words(field: str, before: Any, now: Any) -> str:
    """What changed of an input; empty where nothing did."""
    if field == "data.path":
        names = [name for name in now if (before or {}).get(name) != now[name]]
        return f"its {' and '.join(names)} rows changed" if names else ""
    if field.startswith(CALIBRATION):
        return "" if before == now else "its rows changed"
    if isinstance(before, dict) and isinstance(now, dict):
        words = [
            f"{name} {'is ' if what != 'changed' else ''}{what}" for name, what in differences(before, now).items()
        ]
        return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")
    return (
        ""
        if before == now
        else "it changed"
        if field == "teacher.cache"
        else f"it moved from {_at(before)} to {_at(now)}"
    )


def _at(identity: Any) -> str:
    return "a folder" if isinstance(identity, dict) else str(identity)
