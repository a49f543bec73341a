"""`distill-llm shrink`: a recipe made for a model and data, and carried out."""

from pathlib import Path
from typing import Annotated

import typer

from distill_llm.cli.drafts import Data, Given, Keep, Label, Memory, Speedup, Task, Text, command_of, kept
from distill_llm.cli.dry_run import DryRun
from distill_llm.cli.options import Columns, TrustCode
from distill_llm.cli.run import carry_out
from distill_llm.cli.telling import AsJson, Quiet, telling
from distill_llm.common.errors import InputError
from distill_llm.recipe.recipe import parse_recipe

EXAMPLE = (
    "Examples: distill-llm shrink my-org/my-classifier --data reviews.csv --speedup 2;"
    " distill-llm shrink my-org/my-llm --data chats.jsonl --memory 8GB"
)


def shrink(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Hub id, folder, GGUF file, or package://PACKAGE/PATH.")],
    data: Data = None,
    speedup: Speedup = None,
    keep: Keep = None,
    memory: Memory = None,
    task: Task = None,
    text: Text = None,
    label: Label = None,
    columns: Columns = None,
    output_dir: Annotated[Path | None, typer.Option(help="The run folder; by default runs/MODEL-DATA.")] = None,
    trust_remote_code: TrustCode = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make a smaller or faster model; no recipe is needed. One is made, saved and carried out. The same command again goes on."""
    given = Given(model, data, speedup, keep, memory, task, text, label, columns, output_dir, trust_remote_code)
    with telling(quiet, as_json) as teller:
        made = given.draft()
        for line in made.said:
            teller.say(line)
        if dry_run:  # no file: with other options the same name would be taken
            carry_out(parse_recipe(made.recipe), teller, dry_run)
            return
        file = Path(f"{made.recipe['output_dir'].rstrip('/')}.yaml")
        is_new = not file.exists()
        recipe = kept(file, made, command_of(context))
        teller.say(f"recipe:  {file} (to change it: edit it, then distill-llm run {file})\n")
        try:
            carry_out(recipe, teller)
        except InputError:
            if is_new and not recipe.output_dir.exists():  # refused before any work: other options may follow
                file.unlink()
            raise
