"""`distill-llm sweep`: one recipe at several sizes, or over the values of any fields."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_llm.cli.group import is_main_process
from distill_llm.cli.libraries import is_quiet
from distill_llm.cli.options import RecipeName, Settings
from distill_llm.cli.output import quiet_weights
from distill_llm.cli.telling import AsJson, Quiet, Teller, telling
from distill_llm.common.durations import duration
from distill_llm.common.errors import InputError, faults_in
from distill_llm.recipe.recipe import read_recipe
from distill_llm.recipe.yaml_input import several

if TYPE_CHECKING:
    from distill_llm.pipeline.sweep import OpenSweep

EXAMPLE = "Example: distill-llm sweep quickstart --keep 0.7 0.5 0.35 --over pruning.criterion=fisher,taylor"


class ManyNumbers(typer.core.TyperCommand):
    """A command whose `--keep` takes all numbers behind it: `--keep 0.7 0.5`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As any command, with the option repeated before each of its numbers."""
        words: list[str] = []
        taking = False
        for word in args:
            has_value = words[-1:] != ["--keep"]
            if taking and has_value and _is_number(word):
                words.append("--keep")
            elif has_value:
                taking = word.partition("=")[0] == "--keep"
            words.append(word)
        return super().parse_args(ctx, words)


def sweep(
    recipe: RecipeName,
    keep: Annotated[
        list[str] | None, typer.Option(metavar="SHARE...", help="Values of pruning.keep: --keep 0.7 0.5 0.35")
    ] = None,
    over: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A.B=C,D", help="Values of another field; may be repeated: every combination is a student."
        ),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the runs; by default the recipe's output_dir with -sweep.")
    ] = None,
    settings: Settings = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check, list the students with time and disk, and stop.")
    ] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make one student for each size. The teacher is trained and looked at once. The same command again goes on."""
    fields = [several(text) for text in ([f"pruning.keep={','.join(keep)}"] if keep else []) + (over or [])]
    names = [name for name, _ in fields]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError("--over", twice, fix="give all values of a field together, separated by commas")
    given = read_recipe(recipe, settings)
    quiet_weights()
    from distill_llm.pipeline.sweep import open_sweep, run_sweep
    from distill_llm.report.sweep import sweep_table

    with telling(quiet, as_json) as teller:
        opened = open_sweep(given, over=dict(fields), output_dir=output_dir, listener=teller)
        todo = {cell.name: str(context.folder) for cell, context in opened.todo}
        for cell, context in opened.runs:
            teller.say(f"{context.folder}: {'to do' if cell.name in todo else 'done'}")
        seconds = _seconds(opened, teller) if todo and (dry_run or not (quiet or is_quiet())) else None
        takes = "" if seconds is None else f"about {duration(seconds)} on this machine, "
        line = f"{len(todo)} of {len(opened.runs)} to do: {takes}at most {opened.disk / 1e9:.1f} GB on the disk"
        if dry_run:
            return teller.end(line, todo=todo, seconds=seconds, disk=opened.disk)
        teller.say(line)
        done = run_sweep(opened)
        if "teacher" in done.record:
            teller.say(sweep_table(done.record))
        teller.end(f"page: {done.page}", page=str(done.page), report=str(done.report), **done.record)
    if any(cell.error for cell in done.cells):  # which one and why was told when it happened
        raise typer.Exit(1)


def _seconds(opened: "OpenSweep", teller: Teller) -> float | None:
    """The estimated time; None where there is no estimate, which is told with the reason."""
    from distill_llm.pipeline.sweep import seconds_of

    if not is_main_process():
        return None
    try:
        return seconds_of(opened)
    except InputError as error:
        teller.say(f"no estimate of the time: {faults_in(error)[0]}")
        return None


def _is_number(word: str) -> bool:
    try:
        return bool([float(part) for part in word.split(",")])
    except ValueError:
        return False
