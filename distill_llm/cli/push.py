"""`distill-llm push`: a student, or what it was made with, on the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from distill_llm.cli.options import as_options
from distill_llm.cli.output import say

if TYPE_CHECKING:
    from distill_llm.report.uploads import Upload

EXAMPLE = "Example: distill-llm push runs/quickstart/student me/my-student --private"


def push(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder of a student, adapters, an export, a teacher cache or responses; or a GGUF file.",
        ),
    ],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="USER_OR_ORGANISATION/NAME.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    repo_type: Annotated[
        Literal["model", "dataset"] | None,
        typer.Option(help="By default dataset for teacher caches and responses, else model."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded, and stop.")] = False,
) -> None:
    """Upload a student, or what else a run made, to the Hub. With a student go its tokenizer, card and evaluation results.

    A cache, responses, adapters and an export can be uploaded too.
    After a broken connection run the same command again: what arrived is not sent again.
    """
    from distill_llm.report.hub import check_repo_id
    from distill_llm.report.hub import push as upload
    from distill_llm.report.uploads import find_upload

    names = {"student_dir": "DIR", "folder": "DIR", "cache": "DIR", "repo_id": "REPO_ID"}
    with as_options(("private", "repo_type"), names):
        if not dry_run:
            say(f"pushed: {upload(folder, repo_id, private=private, repo_type=repo_type)}")
            return
        check_repo_id(repo_id)
        found = find_upload(folder)
        found.check_secrets(None)
    for line in _listed(found, repo_id, repo_type or found.repo_type):
        say(line)


def _listed(upload: "Upload", repo_id: str, repo_type: str) -> list[str]:
    sizes = {
        path: len(content) if isinstance(content, bytes) else content.stat().st_size
        for path, content in upload.contents(repo_id).items()
    }
    lines = [f"{size / 1e6:>12,.3f} MB  {path}" for path, size in sorted(sizes.items())]
    return [
        *lines,
        f"{upload.what}: {len(sizes)} files, {sum(sizes.values()) / 1e6:,.1f} MB to the {repo_type} {repo_id}",
    ]
