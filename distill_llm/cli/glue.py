"""`distill-llm glue`: GLUE's whole table for finished models, or for a base model that is fine-tuned on every task."""

from inspect import signature
from pathlib import Path
from typing import Annotated

import typer

from distill_llm.cli.options import TrustCode, as_options
from distill_llm.cli.output import quiet_weights
from distill_llm.cli.telling import AsJson, Quiet, telling

EXAMPLE = "Example: distill-llm glue distilbert/distilbert-base-uncased --tasks cola,mrpc,stsb --data glue/"


def glue(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_RUNS...",
            help="A base model, or finished runs on GLUE tasks (folders, or a folder of them).",
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="A folder with CoLA, SST-2, ... in it, or a Hub id; by default the Hub's copy.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="By default all that there is data (and a run) for.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Folder of the table; by default runs/glue-NAME_OF_THE_MODEL.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens that an example is cut to.")] = 128,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of examples at once in scoring.")] = 64,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="A.B=C",
            help="A field of the recipe that a base model is fine-tuned by: teacher.train.learning_rate=3e-5",
        ),
    ] = None,
    trust_remote_code: TrustCode = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Score on all of GLUE's development sets. One table has all tasks and their average. The same command again goes on."""
    quiet_weights()
    from distill_llm.pipeline.glue import GlueRequest
    from distill_llm.pipeline.glue import glue as run_glue
    from distill_llm.report.glue import average_line, glue_table

    request = GlueRequest(
        tuple(models),
        output_dir or Path("runs") / f"glue-{Path(models[0]).name}",
        data,
        tuple(name.strip() for name in tasks.split(",")) if tasks else (),
        max_length,
        batch_size,
        tuple(settings or []),
        trust_remote_code,
    )
    with telling(quiet, as_json) as teller, as_options(signature(glue).parameters, {"model": "MODEL_OR_RUNS"}):
        record = run_glue(request, teller)
        teller.say(f"\n{glue_table(record)}")
        teller.say(f"table: {request.output_dir / 'glue.md'}")
        teller.end(average_line(record), **record)
