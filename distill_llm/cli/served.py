"""Options of commands whose teacher is served."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ValidationError

from distill_llm.common.errors import InputError, InputErrors
from distill_llm.common.validation import faults_of
from distill_llm.recipe.recipe import Recipe
from distill_llm.recipe.server import ServerSection

if TYPE_CHECKING:
    from distill_llm.models.endpoint import Endpoint

Server = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="A server runs the teacher: address of its OpenAI-compatible endpoint, for example http://localhost:8000/v1."
        " Of TEACHER only the tokenizer and the config are read.",
    ),
]
ServedModel = Annotated[str | None, typer.Option(help="With --server: its name for the model; by default TEACHER.")]
KeyVariable = Annotated[
    str | None,
    typer.Option(
        help="With --server: the environment variable that holds the key, if one is needed; by default OPENAI_API_KEY."
    ),
]

ServerForm = Annotated[
    str | None,
    typer.Option(
        metavar="prompt_logprobs|echo", help="With --server: how log-probabilities are asked for, as of vLLM or OpenAI."
    ),
]
SERVER_OPTIONS = {
    "server.url": "--server",
    "server.model": "--served-model",
    "server.key_variable": "--key-variable",
    "server.form": "--server-form",
    "server.k": "--k",
}
"""Options that fields of a served teacher have."""


def read_server(asked: Mapping[str, Any], k: int | None, recipe: Recipe | None) -> ServerSection | None:
    """The served teacher that options describe, or that of a recipe.

    Args:
        asked: values of the options by field of the section; None: not given.
        k: how many log-probabilities.

    Raises:
        InputError: options beside a recipe or without an address, or what the section refuses.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    if recipe is not None or "url" not in given:
        for name, value in given.items():
            fix = "leave it out, or say with --server where the model is served"
            if recipe is not None:
                fix = "leave it out: a recipe has teacher.server for it (--set overrides a field)"
            raise InputError(f"server.{name}", value, fix=fix)
        return None if recipe is None else recipe.teacher.server
    try:
        return ServerSection.model_validate({**given, **({} if k is None else {"k": k})})
    except ValidationError as error:
        raise InputErrors([each.renamed(f"server.{each.field}") for each in faults_of(error, ServerSection)]) from None


def read_endpoint(url: str | None, model: str, key_variable: str | None) -> "Endpoint | None":
    """Where a teacher is served that answers prompts; None: nowhere."""
    from distill_llm.models.endpoint import Endpoint

    given: dict[str, Any] = {"key_variable": key_variable} if key_variable else {}
    return None if url is None else Endpoint(url, model, **given)
