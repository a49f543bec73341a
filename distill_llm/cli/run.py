"""`distill-llm run` and `distill-llm distill`: carry out a recipe."""

import json
from pathlib import Path
from typing import Annotated

import typer

from distill_llm.cli.options import OutputDir, RecipeName, Settings
from distill_llm.cli.output import quiet_weights, say, say_loading
from distill_llm.common.errors import InputError, faults_in
from distill_llm.recipe.recipe import Recipe, load_recipe

RUN = "Example: distill-llm run quickstart --set pruning.keep=0.4"
DISTILL = "Example: distill-llm distill my_recipe.yaml --student pruned/"


def run(recipe: RecipeName, output_dir: OutputDir = None, settings: Settings = None) -> None:
    """Prune and distill as a recipe says. Run the same command again to continue after a stop."""
    _run(_load(recipe, output_dir, settings or []))


def distill(
    recipe: RecipeName,
    student: Annotated[str | None, typer.Option(help="The student; replaces the recipe's student.model.")] = None,
    output_dir: OutputDir = None,
    settings: Settings = None,
) -> None:
    """Distill into an existing student: run the recipe without its pruning, in a run folder of its own (NAME-distilled)."""
    chosen = [f"student.model={json.dumps(student)}"] if student else []
    try:
        loaded = _load(recipe, output_dir, [*(settings or []), "pruning=null", *chosen])
    except InputError as error:
        if any(fault.field == "pruning" for fault in faults_in(error)):  # the one fault of a recipe without a student
            raise InputError(
                "--student", None, "a student's folder or Hub id, or student.model in the recipe"
            ) from None
        raise
    if output_dir is None and not any(text.startswith("output_dir=") for text in settings or []):
        loaded.output_dir = loaded.output_dir.with_name(f"{loaded.output_dir.name}-distilled")
    _run(loaded)


def _load(name: str, output_dir: Path | None, settings: list[str]) -> Recipe:
    given = [f"output_dir={json.dumps(str(output_dir))}"] if output_dir else []
    return load_recipe(name, [*settings, *given])


def _run(recipe: Recipe) -> None:
    quiet_weights()
    from distill_llm.pipeline import run as pipeline

    result = pipeline.run(recipe, recipe.output_dir)
    for warning in result.metrics.get("warnings", []):
        say(f"WARNING: {warning}")
    say(f"student: {result.student_dir}")
    say(f"report:  {result.report}")
    say_loading(result.student_dir)
