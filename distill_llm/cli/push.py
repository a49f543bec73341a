"""`distill-llm push`: a student on the Hub."""

from pathlib import Path
from typing import Annotated

import typer

from distill_llm.cli.options import as_options
from distill_llm.cli.output import say

EXAMPLE = "Example: distill-llm push runs/quickstart/student me/my-student --private"


def push(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The student's folder, with model, tokenizer and card.")
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="USER_OR_ORGANISATION/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a student with its tokenizer, card and evaluation results to the Hub."""
    from distill_llm.report.hub import push as upload

    with as_options((), {"student_dir": "DIR", "repo_id": "REPO_ID"}):
        url = upload(folder, repo_id, private=private)
    say(f"pushed: {url}")
