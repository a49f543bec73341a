"""The cells of a sweep: one recipe for every combination of the values of some fields."""

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_llm.common.errors import InputError, faults_in, raise_all
from distill_llm.recipe.recipe import Recipe, parse_recipe
from distill_llm.recipe.yaml_input import put

NOT_OF_TEACHER = (
    "description", "output_dir", "student", "pruning", "distillation", "final", "quantize", "report", "export", "hub",
)  # fmt: skip
"""Sections that the stage `teacher` does not read."""
HELD = ("dtype", "quantization", "cache", "ensemble", "moving_average", "peers", "assistant", "server")
"""Fields of the teacher that say how it is held while a student learns, which is after it was trained and scored."""
LONGEST_VALUE = 40
"""Characters of a value in the name of a cell."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder, made of its values.
        values: by field of the recipe, what sets it apart from the other cells.
        recipe: of the run.
    """

    name: str
    values: Mapping[str, Any]
    recipe: Recipe


def first_of(given: Mapping[str, Any], over: Mapping[str, Sequence[Any]]) -> Recipe:
    """The recipe of a plain mapping with the first of the values: it need not have what is varied, such as a size."""
    chosen = copy.deepcopy(dict(given))
    for field, values in over.items():
        if values:
            put(chosen, field, values[0], ("over", field))
    return parse_recipe(chosen)


def cells_of(recipe: Recipe, over: Mapping[str, Sequence[Any]], folder: Path) -> list[Cell]:
    """All combinations of the values, in order; the last field changes fastest.

    Every cell runs in a folder of its own in `folder`. Cells with the same teacher and calibration rows share a file of
    statistics there (`pruning.statistics`), unless the recipe names one.

    Args:
        over: by field (`pruning.keep`), its values.

    Raises:
        InputError: one line per fault of any cell: values that the field does not take, or that stand twice.
    """
    raise_all([fault for field, values in over.items() for fault in _faults(field, values)])
    if not over:
        raise InputError(
            "keep", None, "the sizes to make, for example 0.7 0.5 0.35, or values of another field in `over`"
        )
    plain, cells = recipe.model_dump(mode="json"), []
    faults: dict[str, InputError] = {}
    for values in itertools.product(*over.values()):
        chosen = dict(zip(over, values, strict=True))
        name = _name(chosen)
        given = json.loads(json.dumps({**plain, "output_dir": str(folder / name)}))
        try:
            for field, value in chosen.items():
                put(given, field, value, ("over", field))
            cells.append(Cell(name, chosen, _sharing(parse_recipe(given), folder)))
        except InputError as error:
            faults |= {str(fault): fault for fault in faults_in(error)}
    raise_all(list(faults.values()))
    return cells


def teacher_key(recipe: Recipe) -> str:
    """Equal for recipes with the same trained and scored teacher."""
    sections = recipe.model_dump(mode="json", exclude={*NOT_OF_TEACHER, "teacher"})
    teacher = recipe.teacher.model_dump(mode="json", exclude=set(HELD))
    return _hash([sections, teacher])


def _sharing(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the file that statistics are shared in."""
    section = recipe.pruning
    if section is None or section.layers is not None or section.masks is not None or section.statistics is not None:
        return recipe
    of = [teacher_key(recipe), section.calibration_examples, section.precision, section.moment_share, section.loss]
    of += [each.model_dump(mode="json") for each in section.calibration or ()]
    section.statistics = folder / f"statistics-{_hash(of)}.safetensors"
    return recipe


def _faults(field: str, values: Sequence[Any]) -> list[InputError]:
    texts = [json.dumps(value, sort_keys=True) for value in values]
    if field == "output_dir":
        return [InputError("over", field, fix="remove it: each cell has a folder of its own, named by its values")]
    twice = next((value for value, text in zip(values, texts, strict=True) if texts.count(text) > 1), None)
    return [] if values and twice is None else [InputError(field, twice, "values to try, each once")]


def _name(values: Mapping[str, Any]) -> str:
    """`keep-0.5_criterion-fisher`. Fields have their whole path where the last part would not tell them apart."""
    lasts = [field.rpartition(".")[2] for field in values]
    names = [last if lasts.count(last) == 1 else field for field, last in zip(values, lasts, strict=True)]
    return "_".join(f"{name}-{_word(value)}" for name, value in zip(names, values.values(), strict=True))


def _word(value: Any) -> str:
    """A value as a part of a folder's name; where that cannot be read back, a hash tells it from others."""
    plain = value if isinstance(value, str) else json.dumps(value)
    word = re.sub(r"[^\w.+-]+", "-", re.sub(r'["\s]', "", plain)).strip("-.")
    return (
        word
        if word == plain and len(word) <= LONGEST_VALUE
        else f"{word[:LONGEST_VALUE]}-{_hash(value)[:4]}".lstrip("-")
    )


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=4).hexdigest()
