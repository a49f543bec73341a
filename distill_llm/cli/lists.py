"""`distill-llm recipes` and `distill-llm families`: the shipped recipes and the known families."""

from typing import Annotated

import typer
from rich.table import Table

from distill_llm.cli.output import say
from distill_llm.common.errors import InputError, one_of
from distill_llm.recipe.gallery import entries, groups
from distill_llm.recipe.recipe import find_recipe, recipe_folder, recipe_names

RECIPES = "Example: distill-llm recipes --show tinybert"


def recipes(
    show: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Print one: what it does, its paper, cost and result, and its YAML."),
    ] = None,
) -> None:
    """List the shipped recipes, by the models that they are for."""
    if show is not None:
        _show(show)
        return
    say(f"Recipes in {recipe_folder()}; `distill-llm recipes --show NAME` tells more of one.")
    for title, group in groups(entries()).items():
        table = Table("recipe", "description", title=title, title_justify="left")
        for entry in group:
            table.add_row(entry.name, entry.recipe.description)
        say(table)


def _show(name: str) -> None:
    if name not in recipe_names():
        raise InputError("--show", name, one_of(recipe_names(), name))
    from distill_llm.report.gallery import page

    (entry,) = (entry for entry in entries() if entry.name == name)
    say(page(entry))
    say(find_recipe(name).read_text(encoding="utf-8"))


def families() -> None:
    """List the model families that can be pruned, with their units."""
    from distill_llm.pruning.supported import families_table

    say(families_table())
