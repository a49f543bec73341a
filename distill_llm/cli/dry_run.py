"""`--dry-run`: what a run would do and take, before anything is trained."""

from typing import TYPE_CHECKING, Annotated

import typer

from distill_llm.cli.estimate import ROOM, estimate_table
from distill_llm.cli.telling import JsonTeller, Teller
from distill_llm.common.durations import duration
from distill_llm.recipe.recipe import Recipe

if TYPE_CHECKING:
    from distill_llm.pipeline.preview import Preview

DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, then show the recipe, the stages, a plan by the weights alone, memory and time; train nothing.",
    ),
]


def tell_preview(recipe: Recipe, teller: Teller) -> None:
    """Tell what a run would do. `--json`: an event `planned` for each stage, then `end` with recipe, sizes and plan."""
    from distill_llm.pipeline.preview import preview
    from distill_llm.report.plans import plan_table

    found = preview(recipe)
    teller.say(recipe.to_yaml())
    if found.plan is not None:
        teller.say(plan_table(found.plan, found.teacher, "plan by magnitude"))
    for name in found.stages:
        teller.say(f"stage {name}{': done before' if name in found.done else ''}")
    if found.forecast is not None:
        count, size = found.devices.count, found.devices.size / 1e9
        teller.say(estimate_table(found.forecast, found.devices, f"on this machine: {count} x {size:.0f} GB"))
    for note in found.notes:
        teller.say(note)
    if isinstance(teller, JsonTeller):
        _tell_stages(found, teller)
    seconds = None if found.forecast is None else found.forecast.seconds
    most = None if found.forecast is None else max(stage.bytes for stage in found.forecast.stages)
    teller.end(
        _line(found, seconds, most),
        recipe=recipe.model_dump(mode="json"),
        params={"teacher": found.params[0], "student": found.params[1]},
        plan=None if found.plan is None else found.plan.record(),
        seconds=seconds,
        bytes=most,
        notes=found.notes,
    )


def _tell_stages(found: "Preview", teller: JsonTeller) -> None:
    """An event for each stage: `stage`, `before` (done already), and, where they are estimated, `seconds`, `bytes` and `fits`."""
    forecast = found.forecast
    priced = {stage.name: stage for stage in forecast.stages} if forecast is not None else {}
    for name in found.stages:
        fields = {}
        if forecast is not None and name in priced:
            stage = priced[name]
            fields = {"seconds": stage.flops / forecast.rate, "bytes": stage.bytes}
            fields["fits"] = stage.bytes <= ROOM * found.devices.size
        teller.tell("planned", stage=name, before=name in found.done, **fields)


def _line(found: "Preview", seconds: float | None, most: float | None) -> str:
    from distill_llm.report.tables import count

    teacher, student = found.params
    sizes = f"{count(teacher)} parameters" + (f" become {count(student)}" if student is not None else "")
    takes = "" if seconds is None or most is None else f"; about {duration(seconds)} and {most / 1e9:.2g} GB at most"
    return f"dry run: {sizes}{takes}; nothing was trained"
