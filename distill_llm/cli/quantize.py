"""`distill-llm quantize`: a finished model in fewer bits."""

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distill_llm.cli.options import Columns, DataPath, ModelName, as_options, read_columns
from distill_llm.cli.output import quiet_weights, say, say_loading
from distill_llm.recipe.quantize import QuantizeSection

if TYPE_CHECKING:
    from distill_llm.pipeline.quantizing import Quantized

EXAMPLE = "Example: distill-llm quantize runs/quickstart/student --bits 8 --activations --task embedded --max-length 64"
_FIELDS = QuantizeSection.model_fields


def _option(name: str, *flags: str, **more: Any) -> Any:
    """The option of a field of the recipe's section."""
    return typer.Option(*flags, help=_FIELDS[name].description, **more)


def quantize(
    model: ModelName,
    bits: Annotated[int, _option("bits")],
    activations: Annotated[bool, _option("activations", "--activations")] = False,
    symmetric: Annotated[bool, _option("symmetric", "--symmetric/--asymmetric")] = True,
    group_size: Annotated[int | None, _option("group_size")] = None,
    smooth: Annotated[float | None, _option("smooth")] = None,
    task: Annotated[
        str | None, typer.Option(help="A task to score on, and whose training rows `smooth` is calibrated on.")
    ] = None,
    data: DataPath = None,
    columns: Columns = None,
    max_length: Annotated[int, typer.Option(min=8, help="Number of tokens that an example is cut to.")] = 128,
    test_examples: Annotated[int | None, typer.Option(min=1, help="Test rows to score on; by default all.")] = None,
    calibration_examples: Annotated[int, _option("calibration_examples", min=1)] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of examples in the batch that is timed.")] = 32,
    sequence_length: Annotated[int, typer.Option(min=1, help="Number of tokens in each of them.")] = 64,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write; by default beside MODEL: student-int8.")
    ] = None,
) -> None:
    """Round a model to 8 or 4 bits; show what it costs and brings."""
    from distill_llm.checks.quantize import open_quantizing
    from distill_llm.data.spec import DataSpec
    from distill_llm.pipeline.quantizing import Batch, quantize_model
    from distill_llm.quantizing.scheme import Scheme

    quiet_weights()
    scheme = Scheme(bits, activations, symmetric, group_size, smooth)
    folder = output or Path(f"{model.rstrip('/')}-int{bits}")
    with as_options(signature(quantize).parameters, {"model": "MODEL"}):
        spec = None
        if task is not None:
            named = read_columns(columns)
            spec = DataSpec(task, data, named, max_length, test_examples=test_examples)
        opened = open_quantizing(model, scheme, spec, folder)
        done = quantize_model(opened, scheme, folder, calibration_examples, Batch(batch_size, sequence_length))
    _show(done, scheme.words, opened.data.task.main_metric if opened.data else "")
    say(f"quantized model: {folder}")
    say_loading(folder)


def _show(done: "Quantized", words: str, metric: str) -> None:
    from rich.table import Table

    from distill_llm.metrics.errors import shown_score

    costs, (before, after) = done.costs, done.megabytes
    table = Table("", "before", "quantized", title=f"{words}; {costs.model.device}")
    if done.scores is not None:
        table.add_row(metric, *(shown_score(each) for each in done.scores))
    table.add_row("weights on disk", f"{before:.1f} MB", f"{after:.1f} MB")
    table.add_row("memory of the weights", f"{costs.other.weights_mb:.1f} MB", f"{costs.model.weights_mb:.1f} MB")
    table.add_row("latency of a batch", f"{costs.other.latency_ms:.1f} ms", f"{costs.model.latency_ms:.1f} ms")
    spread = f"({costs.speedup_min:.2f}–{costs.speedup_max:.2f})"
    table.add_row("measured speed-up", "1.00x", f"{costs.speedup:.2f}x {spread}")
    say(table)
