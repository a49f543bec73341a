"""`distill-llm run` and `distill-llm distill`: carry out a recipe."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill_llm.cli.dry_run import DryRun, tell_preview
from distill_llm.cli.options import OutputDir, RecipeName, Settings
from distill_llm.cli.output import quiet_weights
from distill_llm.cli.telling import AsJson, Quiet, Teller, telling
from distill_llm.common.errors import InputError, faults_in
from distill_llm.recipe.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from distill_llm.pipeline.run import RunResult

RUN = "Example: distill-llm run quickstart --set pruning.keep=0.4"
DISTILL = "Example: distill-llm distill my_recipe.yaml --student pruned/"


def run(
    recipe: RecipeName,
    output_dir: OutputDir = None,
    settings: Settings = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Prune and distill as a recipe says. Run the same command again to continue after a stop."""
    with telling(quiet, as_json) as teller:
        carry_out(_load(recipe, output_dir, settings or []), teller, dry_run)


def distill(
    recipe: RecipeName,
    student: Annotated[str | None, typer.Option(help="The student; replaces the recipe's student.model.")] = None,
    output_dir: OutputDir = None,
    settings: Settings = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Distill into an existing student. The recipe runs without its pruning, in a run folder of its own (NAME-distilled)."""
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
    with telling(quiet, as_json) as teller:
        carry_out(loaded, teller, dry_run)


def _load(name: str, output_dir: Path | None, settings: list[str]) -> Recipe:
    given = [f"output_dir={json.dumps(str(output_dir))}"] if output_dir else []
    return load_recipe(name, [*settings, *given])


def carry_out(recipe: Recipe, teller: Teller, dry_run: bool = False) -> None:
    """Carry out a recipe, and tell its result: the table, where everything is, and what to do next."""
    quiet_weights()
    if dry_run:
        tell_preview(recipe, teller)
        return
    from distill_llm.pipeline import run as pipeline
    from distill_llm.report.tables import results_table
    from distill_llm.report.usage import loading

    result = pipeline.run(recipe, recipe.output_dir, teller)
    student, metrics = result.student_dir, result.metrics
    for warning in metrics.get("warnings", []):
        teller.say(f"WARNING: {warning}")
    if "student" in metrics:
        teller.say(f"\n{results_table(metrics)}")
    teller.say(f"report:  {result.page}")
    teller.say(f"loads as {loading(student)}")
    teller.say(f"next:    {_next(recipe, result)}")
    teller.end(_line(result), student=str(student), report=str(result.report), page=str(result.page), metrics=metrics)


def _next(recipe: Recipe, result: "RunResult") -> str:
    """Commands that the user may want now."""
    own = recipe.output_dir / "teacher"
    teacher = own if own.is_dir() else recipe.teacher.model
    commands = [
        f"profile {result.student_dir} --against {teacher}",
        f"export {result.student_dir} --format onnx",
        f"push {result.student_dir} YOUR_NAME/NAME_OF_THE_STUDENT",
    ]
    return "\n         ".join(f"distill-llm {command}" for command in commands)


def _line(result: "RunResult") -> str:
    """The result in one line."""
    from distill_llm.report.report import summary

    said = f" {summary(result.metrics)}" if "student" in result.metrics else ""
    return f"student: {result.student_dir}{'.' if said else ''}{said}"
