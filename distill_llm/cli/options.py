"""Options that several commands share, and faults renamed after the options."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from distill_llm.common.errors import InputError, InputErrors, faults_in, one_of
from distill_llm.common.finite import NotFinite
from distill_llm.recipe.recipe import recipe_names
from distill_llm.recipe.sections import ColumnsSection


def _recipes_beginning(incomplete: str) -> list[str]:
    """Shipped recipes and YAML files, for the completion of the shell."""
    files = [str(path) for ending in ("yaml", "yml") for path in Path().glob(f"{incomplete}*.{ending}")]
    return [name for name in (*recipe_names(), *files) if name.startswith(incomplete)]


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.", autocompletion=_recipes_beginning
    ),
]
OutputDir = Annotated[Path | None, typer.Option(help="The run folder; replaces the recipe's output_dir.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field of the recipe; may be repeated.")
]
ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub id, folder, GGUF file, or package://PACKAGE/PATH.")
]
TaskName = Annotated[str, typer.Option(help="A GLUE task, embedded, text, prompts, classification or regression.")]
Columns = Annotated[
    str | None,
    typer.Option(metavar="NAME=COLUMN,...", help="Columns of your own data, for example text=review,label=mood."),
]
DataPath = Annotated[
    str | None, typer.Option(help="Folder, file or Hub id of the data; GLUE tasks come from the Hub by default.")
]
Separator = Annotated[
    str | None,
    typer.Option(
        metavar="CHARACTER",
        help="Character between the columns of .csv and .tsv files; by default found in the header line.",
    ),
]
Encoding = Annotated[
    str | None,
    typer.Option(help="Encoding of files of text, for example cp1252; by default UTF-8 or the byte order mark's."),
]
DropIncomplete = Annotated[
    bool, typer.Option("--drop-incomplete", help="Leave out rows that lack a text or a label; by default an error.")
]
TeacherDtype = Annotated[
    str | None,
    typer.Option(
        metavar="float32|bfloat16|float16",
        help="Dtype of the teacher's weights; by default bfloat16 on CUDA, else float32.",
    ),
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(metavar="YAML", help="Further arguments of the chat template: '{enable_thinking: false}'."),
]

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run the code that the model brings along, if it does; read that code first."
    ),
]

SECTIONS = ("data", "pruning", "evaluation")
"""Sections of a recipe whose fields are options of the same name in commands."""
OTHERWISE = {"data.path": "data"}
"""Fields whose option has another name."""


@contextmanager
def as_options(options: Collection[str], arguments: Mapping[str, str] | None = None) -> Iterator[None]:
    """Names faults as the command line does: `--keep` for `pruning.keep`.

    Args:
        options: the options of the command. A field that is none of them keeps its name: `--set` gives it.
        arguments: the metavar of each field that is a positional argument.
    """
    try:
        yield
    except InputError as error:
        raise InputErrors(_renamed(fault, options, arguments or {}) for fault in faults_in(error)) from None


def _renamed(fault: InputError, options: Collection[str], arguments: Mapping[str, str]) -> InputError:
    """The fault under the option's name. Options that its text mentions in backticks are renamed too."""

    def mention(match: re.Match[str]) -> str:
        return f"`{_option(match[1], options, arguments)}`"

    if isinstance(fault, NotFinite):  # of no option
        return fault
    accepted, fix = (re.sub(r"`([\w.]+)`", mention, text) for text in (fault.accepted, fault.fix))
    return InputError(_option(fault.field, options, arguments), fault.given, accepted, fix=fix)


def _option(field: str, options: Collection[str], arguments: Mapping[str, str]) -> str:
    if field in arguments:
        return arguments[field]
    names = field.split(".")
    name = OTHERWISE.get(field) or (names[1] if names[0] in SECTIONS and len(names) > 1 else field)  # data.columns.text
    return _written(name) if name in options else field


def _written(option: str) -> str:
    return "--" + option.replace("_", "-")


def read_columns(text: str | None) -> dict[str, str] | None:
    """The mapping in `text=review,label=mood`; None for None.

    Raises:
        InputError: an unknown name, or a part that is not `NAME=COLUMN`.
    """
    if text is None:
        return None
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, _, column = (word.strip() for word in part.partition("="))
        if name not in ColumnsSection.model_fields:
            raise InputError("--columns", name, one_of(ColumnsSection.model_fields, name) + ", as NAME=COLUMN")
        if not column or name in columns:
            raise InputError(
                "--columns", part.strip(), "NAME=COLUMN, each name once, for example text=review,label=mood"
            )
        columns[name] = column
    return columns
