"""`distill-llm estimate`: memory and time of a recipe, before it runs."""

from inspect import signature
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from distill_llm.cli.options import RecipeName, Settings, as_options
from distill_llm.cli.output import quiet_weights, say
from distill_llm.common.durations import duration
from distill_llm.common.errors import InputError, one_of
from distill_llm.recipe.recipe import load_recipe

if TYPE_CHECKING:
    from distill_llm.pipeline.estimating import Forecast
    from distill_llm.pipeline.prices import Devices

EXAMPLE = "Example: distill-llm estimate my_recipe.yaml --devices 8x80GB --accelerate fsdp2 --tflops 400"
SHARINGS = ("ddp", "fsdp2", "zero3")
ROOM = 0.9
"""The share of a device that is left to tensors; CUDA, its libraries and fragmentation take the rest."""


def estimate(
    recipe: RecipeName,
    devices: Annotated[str, typer.Option(metavar="NxMEMORY", help="The GPUs, for example 8x80GB.")] = "1x80GB",
    accelerate: Annotated[str, typer.Option(metavar="|".join(SHARINGS), help="How they share the training.")] = "ddp",
    tflops: Annotated[
        float | None,
        typer.Option(min=0.001, help="TFLOP/s that a device reaches in training; left out: measured on this machine."),
    ] = None,
    settings: Settings = None,
) -> None:
    """Estimate the memory and time of each stage of a recipe. Memory is that of one device; no weight is read."""
    if accelerate not in SHARINGS:
        raise InputError("--accelerate", accelerate, one_of(SHARINGS, accelerate))
    loaded = load_recipe(recipe, settings or [])
    quiet_weights()
    from distill_llm.pipeline import estimating
    from distill_llm.pipeline.prices import Devices

    with as_options(signature(estimate).parameters):
        chosen = Devices.named(devices, accelerate)  # type: ignore[arg-type]
        forecast = estimating.estimate(loaded, chosen, tflops)
    say(estimate_table(forecast, chosen, f"{recipe} on {devices}" + (f", {accelerate}" if chosen.count > 1 else "")))
    rows = f"{forecast.rows.train:,} training rows of at most {forecast.rows.longest} tokens"
    say(f"{rows}; {forecast.rate / 1e12:.3g} TFLOP/s a device, {forecast.source}")


def estimate_table(forecast: "Forecast", devices: "Devices", title: str) -> Table:
    """Memory and time, a row for each stage."""
    table = Table(title=title, title_justify="left")
    for name in ("stage", "GB a device", "of it", "fits", "time"):
        table.add_column(name, justify="right" if name in ("GB a device", "time") else "left")
    for stage in forecast.stages:
        parts = ", ".join(f"{part} {_gigabytes(size)}" for part, size in stage.parts.items())
        fits = "yes" if stage.bytes <= ROOM * devices.size else "no"
        table.add_row(stage.name, _gigabytes(stage.bytes), parts, fits, duration(stage.flops / forecast.rate))
    table.add_row("all", "", "", "", duration(forecast.seconds))
    return table


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f}" if size >= 1e8 else f"{size / 1e9:.3f}"
