"""`distill-llm prune`: importance, plan, pruning and compensation, with no training."""

from inspect import signature
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from distill_llm.cli.options import Columns, DataPath, ModelName, TaskName, TrustCode, as_options, read_columns
from distill_llm.cli.output import quiet_weights, say, say_loading
from distill_llm.recipe.pruning import PruningSection
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.recipe.yaml_input import override

EXAMPLE = "Example: distill-llm prune textattack/bert-base-uncased-SST-2 --task sst2 --keep 0.5 --output-dir pruned"
_PRUNING = PruningSection.model_fields


def _option(name: str, metavar: str | None = None) -> Any:
    """The option of a field of the recipe's pruning section. Numbers stay text: the section checks them."""
    words = get_args(_PRUNING[name].annotation)
    metavar = metavar or ("|".join(words) if words else None)
    return typer.Option(metavar=metavar, help=_PRUNING[name].description)


def prune(
    model: ModelName,
    task: TaskName,
    keep: Annotated[str, _option("keep", "NUMBER")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the pruned model.")],
    data: DataPath = None,
    columns: Columns = None,
    max_length: Annotated[int, typer.Option(min=8, help="Number of tokens that an example is cut to.")] = 128,
    units: Annotated[str, _option("units", "A,B")] = ",".join(_PRUNING["units"].default),
    criterion: Annotated[str, _option("criterion")] = _PRUNING["criterion"].default,
    cost: Annotated[str, _option("cost")] = _PRUNING["cost"].default,
    scope: Annotated[str, _option("scope")] = _PRUNING["scope"].default,
    round_to: Annotated[str, _option("round_to", "NUMBER")] = str(_PRUNING["round_to"].default),
    uniform: Annotated[bool, _option("uniform")] = _PRUNING["uniform"].default,
    compensate: Annotated[str, _option("compensate", "true|false|in_order")] = str(
        _PRUNING["compensate"].default
    ).lower(),
    calibration_examples: Annotated[str | None, _option("calibration_examples", "NUMBER")] = None,
    trust_remote_code: TrustCode = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Set any other field of a recipe: pruning.cuts=5, seed=1."),
    ] = None,
) -> None:
    """Measure importance, prune, compensate and save; train nothing."""
    chosen: dict[str, Any] = {"keep": keep, "criterion": criterion, "cost": cost, "scope": scope, "round_to": round_to}
    chosen |= {"uniform": uniform, "compensate": compensate, "units": [unit.strip() for unit in units.split(",")]}
    if calibration_examples is not None:
        chosen["calibration_examples"] = calibration_examples
    given = {
        "teacher": {"model": model, "trust_remote_code": trust_remote_code},
        "data": {"task": task, "path": data, "columns": read_columns(columns), "max_length": max_length},
        "pruning": chosen,
        "output_dir": str(output_dir),
    }
    for text in settings or []:
        override(given, text)
    with as_options(signature(prune).parameters, {"teacher.model": "MODEL", "model": "MODEL"}):
        recipe = parse_recipe(given)
        quiet_weights()
        from distill_llm.pipeline.run import prune_recipe

        folder = prune_recipe(recipe)
    say(f"pruned model: {folder}")
    say_loading(folder)
