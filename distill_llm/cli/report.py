"""`distill-llm report`: a finished run's report, made again."""

from pathlib import Path
from typing import Annotated

import typer

from distill_llm.cli.options import as_options
from distill_llm.cli.output import say

EXAMPLE = "Example: distill-llm report runs/quickstart"


def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a finished run.")],
) -> None:
    """Write the report of a finished run again. Its numbers become report.html, report.md and the figures."""
    from distill_llm.pipeline.reporting import rewrite_report

    with as_options((), {"run_dir": "RUN_DIR"}):
        page = rewrite_report(folder)
    say(f"report: {page}")
