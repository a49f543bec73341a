"""`distill-llm init`: a recipe with comments, made for a model and data, or to fill in."""

from pathlib import Path
from typing import Annotated

import typer

from distill_llm.cli.drafts import Data, Given, Keep, Label, Memory, Speedup, Task, Text, command_of, kept
from distill_llm.cli.options import Columns, TrustCode
from distill_llm.cli.telling import telling
from distill_llm.common.errors import InputError

EXAMPLE = (
    "Examples: distill-llm init;"
    " distill-llm init my-org/my-classifier --data reviews.csv --keep 0.4 --output my_recipe.yaml"
)


def init(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="The model; left out: a recipe to fill in.", show_default=False)
    ] = None,
    data: Data = None,
    speedup: Speedup = None,
    keep: Keep = None,
    memory: Memory = None,
    task: Task = None,
    text: Text = None,
    label: Label = None,
    columns: Columns = None,
    output_dir: Annotated[Path | None, typer.Option(help="The recipe's run folder.")] = None,
    trust_remote_code: TrustCode = False,
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a recipe with comments, for a model or to fill in. For a model it is the one that `shrink` would carry out."""
    given = (data, speedup, keep, memory, task, text, label, columns, output_dir)
    if model is None and any(value is not None for value in given):
        raise InputError("MODEL", None, fix="name the model that the recipe is for, or give no option but --output")
    with telling() as teller:
        if model is None:
            from distill_llm.drafting.writing import STARTER as made
        else:
            made = Given(model, *given, trust_remote_code).draft()
        for line in made.said:
            teller.say(line)
        kept(output, made, command_of(context))
        teller.say(f"next:    distill-llm run {output} --dry-run")
        teller.end(f"recipe:  {output}")
