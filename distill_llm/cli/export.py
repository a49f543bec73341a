"""`distill-llm export`: a student for other programs."""

from pathlib import Path
from typing import Annotated

import typer

from distill_llm.cli.options import as_options
from distill_llm.cli.output import quiet_weights, say

EXAMPLE = "Example: distill-llm export runs/quickstart/student --format onnx --quantize int8"


def export(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder with a model and its tokenizer.")],
    format: Annotated[str, typer.Option(help="gguf (llama.cpp) or onnx (onnxruntime).")],
    quantize: Annotated[
        str | None, typer.Option(help="Type of the weights. gguf: f16, bf16, f32 or q8_0; onnx: f32 or int8.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="The file or folder to write; by default beside DIR.")] = None,
) -> None:
    """Write a student for llama.cpp or onnxruntime."""
    from distill_llm.export import export as write

    quiet_weights()
    with as_options(("format", "quantize", "output"), {"model_dir": "DIR"}):
        done = write(folder, format, output, quantize)
    say(done.summary)
    for note in done.notes:
        say(note)
