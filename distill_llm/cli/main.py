"""The command line. Bad input gives exit code 2 and a line per fault on stderr. Heavy imports wait until they are needed."""

from typing import Annotated

import typer

from distill_llm.cli.cache import EXAMPLE as CACHE
from distill_llm.cli.cache import cache
from distill_llm.cli.env import EXAMPLE as ENV
from distill_llm.cli.env import env
from distill_llm.cli.estimate import EXAMPLE as ESTIMATE
from distill_llm.cli.estimate import estimate
from distill_llm.cli.evaluate import EXAMPLE as EVALUATE
from distill_llm.cli.evaluate import evaluate
from distill_llm.cli.export import EXAMPLE as EXPORT
from distill_llm.cli.export import export
from distill_llm.cli.glue import EXAMPLE as GLUE
from distill_llm.cli.glue import glue
from distill_llm.cli.group import CommandGroup
from distill_llm.cli.init import EXAMPLE as INIT
from distill_llm.cli.init import init
from distill_llm.cli.launching import shareable
from distill_llm.cli.libraries import subdued
from distill_llm.cli.lists import RECIPES, families, recipes
from distill_llm.cli.profile import EXAMPLE as PROFILE
from distill_llm.cli.profile import profile
from distill_llm.cli.prune import EXAMPLE as PRUNE
from distill_llm.cli.prune import prune
from distill_llm.cli.push import EXAMPLE as PUSH
from distill_llm.cli.push import push
from distill_llm.cli.quantize import EXAMPLE as QUANTIZE
from distill_llm.cli.quantize import quantize
from distill_llm.cli.report import EXAMPLE as REPORT
from distill_llm.cli.report import report
from distill_llm.cli.respond import EXAMPLE as RESPOND
from distill_llm.cli.respond import respond
from distill_llm.cli.run import DISTILL, RUN, distill, run
from distill_llm.cli.shrink import EXAMPLE as SHRINK
from distill_llm.cli.shrink import shrink
from distill_llm.cli.sweep import EXAMPLE as SWEEP
from distill_llm.cli.sweep import ManyNumbers, sweep

app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

for _command, _example in (
    (shrink, SHRINK),
    (init, INIT),
    (shareable(run), RUN),
    (shareable(distill), DISTILL),
    (shareable(prune), PRUNE),
    (evaluate, EVALUATE),
    (glue, GLUE),
    (estimate, ESTIMATE),
    (profile, PROFILE),
    (report, REPORT),
    (quantize, QUANTIZE),
    (export, EXPORT),
    (push, PUSH),
    (shareable(respond), RESPOND),
    (shareable(cache), CACHE),
    (env, ENV),
    (recipes, RECIPES),
    (families, "Example: distill-llm families"),
):
    app.command(epilog=_example)(_command)
app.command(cls=ManyNumbers, epilog=SWEEP)(shareable(sweep))


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"distill_llm {version('distill_llm')}")
        raise typer.Exit


@app.callback()
def _settings(
    context: typer.Context,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Show no progress bars, notices, or warnings of libraries; of `run`, the last line alone.",
        ),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Prune and distill Hugging Face models."""
    context.with_resource(subdued(quiet))


if __name__ == "__main__":
    app(prog_name="distill-llm")
