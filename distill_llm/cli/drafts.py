"""What `shrink` and `init` share: the options that say what a recipe is made for, the draft, and its file."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from distill_llm.cli.group import arguments_of
from distill_llm.cli.options import as_options, read_columns
from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.recipe.recipe import Recipe, load_recipe

Data = Annotated[
    str | None, typer.Option(help="The rows to learn from: a file, a folder or a Hub id. GLUE tasks have their own.")
]
Speedup = Annotated[float | None, typer.Option(help="How many times as fast the student shall be on this device.")]
Keep = Annotated[float | None, typer.Option(help="The share of the layers' parameters that stays.")]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="What weights and KV cache may take, for example 8GB.")
]
Task = Annotated[
    str | None,
    typer.Option(help="classification, regression, text, prompts, or a GLUE task; by default found from the rows."),
]
Text = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column with the text; by default found.")]
Label = Annotated[str | None, typer.Option(metavar="COLUMN", help="The column with the label; by default found.")]


@dataclass(frozen=True)
class Given:
    """The options that both commands have."""

    model: str
    data: str | None
    speedup: float | None
    keep: float | None
    memory: str | None
    task: str | None
    text: str | None
    label: str | None
    columns: str | None
    output_dir: Path | None
    trust_remote_code: bool

    def draft(self) -> Any:
        """The recipe (`distill_llm.drafting.draft.Draft`)."""
        from distill_llm.drafting.draft import Wish, draft
        from distill_llm.drafting.target import Target

        columns = read_columns(self.columns) or {}
        for name, column in (("text", self.text), ("label", self.label)):
            if column is not None and name in columns:
                raise InputError(f"--{name}", column, fix=f"leave it out: --columns names the {name} too")
            columns |= {} if column is None else {name: column}
        own = ("speedup", "keep", "memory", "task", "text", "label", "columns", "trust_remote_code")
        with as_options((*own, "data"), {"model": "MODEL"}):
            target = Target(self.keep, self.speedup, self.memory)
            wish = Wish(self.model, self.data, target, self.task, columns, self.output_dir, self.trust_remote_code)
            return draft(wish)


def kept(file: Path, made: Any, command: str) -> Recipe:
    """Write the draft to a file, unless it is there, and read the recipe.

    Raises:
        InputError: the file holds another recipe.
    """
    from distill_llm.drafting.writing import written

    text = written(made, command)
    if file.exists():
        if _recipe_in(file.read_text(encoding="utf-8")) != _recipe_in(text):
            fix = f"carry it out with `distill-llm run {file}`, or name another output: it holds another recipe than this one"
            raise InputError("recipe", str(file), fix=fix)
    else:
        with written_whole(file) as path:
            path.write_text(text, encoding="utf-8")
    return load_recipe(file)


def _recipe_in(text: str) -> list[str]:
    """The lines of a recipe's text but for those that are comments."""
    return [line for line in text.splitlines() if not line.startswith("#")]


def command_of(context: typer.Context) -> str:
    """The command line as it was given."""
    return shlex.join(["distill-llm", *arguments_of(context)])
