"""The door of `teacher.cache`: the cache that a recipe's student learns from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import datasets

from distill_llm.checks.ensemble import identity
from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.padding import LENGTH
from distill_llm.losses.terms.term import Use
from distill_llm.models.finding import OpenModel
from distill_llm.recipe.recipe import Recipe
from distill_llm.teachers.cache import CachedTeacher

if TYPE_CHECKING:
    from distill_llm.checks.recipe import Opened


def open_cached(recipe: Recipe, teacher: OpenModel, others: tuple[OpenModel, ...]) -> CachedTeacher | None:
    """Open the cache: complete, made with this teacher, dtype and tokenizer, and able to serve the losses."""
    if recipe.teacher.cache is None or recipe.distillation is None:
        return None
    # A Hub model may not be downloaded yet; compared before training.
    local = recipe.teacher.server is not None or all(Path(model.path).exists() for model in (teacher, *others))
    with _named_as_in_a_recipe():
        cache = CachedTeacher(
            recipe.teacher.cache, identity(recipe, teacher, others) if local else None, teacher.tokenizer
        )
    given, own = recipe.teacher.dtype, cache.index.settings.dtype
    if given is not None and own not in (None, given):
        fix = f"leave it out, or set it to {own}, the dtype of the teacher that wrote teacher.cache"
        raise InputError("teacher.dtype", given, fix=fix)
    raise_all(recipe.distillation.losses.faults(Use(teacher=cache.gives), "distillation.losses"))
    return cache


def check_cached_rows(opened: "Opened", train: datasets.Dataset) -> None:
    """Check that the recipe's cache was written for these encoded rows. Teacher and losses were checked before."""
    if opened.cache is None:
        return
    known = [name for name in train.column_names if name != LENGTH]
    with _named_as_in_a_recipe():
        opened.cache.check(dataset=train.select_columns(known))


def check_cached_weights(opened: "Opened") -> CachedTeacher | None:
    """The recipe's cache, after a check that it was made with the teacher's weights, which are downloaded by now."""
    if opened.cache is not None:
        with _named_as_in_a_recipe():
            opened.cache.check(identity(opened.recipe, opened.teacher, opened.others))
    return opened.cache


@contextmanager
def _named_as_in_a_recipe() -> Iterator[None]:
    """Faults of a cache, or of the rows that it is compared with, under the recipe's field."""
    try:
        yield
    except InputError as error:
        raise error.renamed("data.path" if error.field.startswith("dataset") else "teacher.cache") from None
