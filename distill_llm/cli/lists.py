"""`distill-llm recipes` and `distill-llm families`: the shipped recipes and the known families."""

from rich.table import Table

from distill_llm.cli.output import say
from distill_llm.recipe.recipe import recipe_descriptions, recipe_folder


def recipes() -> None:
    """List the shipped recipes: name and description."""
    table = Table("recipe", "description", title=f"recipes in {recipe_folder()}")
    for name, description in recipe_descriptions().items():
        table.add_row(name, description)
    say(table)


def families() -> None:
    """List the model families that can be pruned, and the units that can go."""
    from distill_llm.pruning.supported import families_table

    say(families_table())
