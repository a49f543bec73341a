"""`distill-llm cache`: the command line of teacher caches."""

import json
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from distill_llm.cli.group import is_main_process
from distill_llm.cli.options import (
    Columns,
    DropIncomplete,
    Encoding,
    Separator,
    TeacherDtype,
    TrustCode,
    as_options,
    read_columns,
)
from distill_llm.cli.served import (
    SERVER_OPTIONS,
    KeyVariable,
    ServedModel,
    Server,
    ServerForm,
    read_server,
)
from distill_llm.common.errors import InputError, raise_all
from distill_llm.recipe.recipe import Recipe, load_recipe, recipe_names
from distill_llm.recipe.server import ServerSection

EXAMPLE = (
    "Examples: distill-llm cache my_recipe.yaml --output-dir cache;"
    " distill-llm cache my-org/my-llm --task text --data corpus.txt --max-length 1024 --output-dir cache"
)


Number = Annotated[
    int | None,
    typer.Option(
        help="Number of draws, or of most probable tokens, per output: 1 to 255; by default 50, of a server 20."
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        metavar="sampled|topk",
        help="Store unbiased draws, or the most probable tokens; by default sampled, of a server topk.",
    ),
]


def cache(
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|TEACHER",
            help="A recipe, whose teacher and data are used; or a model: Hub id, folder, GGUF file, package://PACKAGE/PATH.",
        ),
    ],
    output_dir: Annotated[Path, typer.Option(help="Folder for the cache; a recipe then names it as teacher.cache.")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field of the recipe.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="Without a recipe: the task, as in data.task.")] = None,
    data: Annotated[str | None, typer.Option(help="Without a recipe: the data, as in data.path.")] = None,
    columns: Columns = None,
    separator: Separator = None,
    encoding: Encoding = None,
    drop_incomplete: DropIncomplete = False,
    max_length: Annotated[
        int | None, typer.Option(min=8, help="Without a recipe: tokens that an example is cut to, by default 128.")
    ] = None,
    train_examples: Annotated[int | None, typer.Option(min=1, help="Without a recipe: rows to use.")] = None,
    holdout_examples: Annotated[int | None, typer.Option(min=0, help="Without a recipe: rows kept aside.")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**32 - 1, help="Without a recipe: seed of the split, and of the draws.")
    ] = None,
    k: Number = None,
    method: Method = None,
    server: Server = None,
    served_model: ServedModel = None,
    key_variable: KeyVariable = None,
    server_form: ServerForm = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of examples at once.")] = 8,
    dtype: TeacherDtype = None,
    trust_remote_code: TrustCode = False,
) -> None:
    """Write what a teacher says about the training rows to disk, once. Run the same command again to continue after a stop."""
    where = {"path": data, "columns": read_columns(columns), "separator": separator, "encoding": encoding}
    counts = {"max_length": max_length, "train_examples": train_examples, "holdout_examples": holdout_examples}
    rows: dict[str, Any] = {"task": task, **where, **counts, "seed": seed, "drop_incomplete": drop_incomplete or None}
    rows = {name: value for name, value in rows.items() if value is not None}
    recipe = _recipe(teacher, output_dir, settings or [], rows, trust_remote_code)
    if recipe is None and task is None:
        raise InputError("--task", None, "the task of the data, or a recipe in place of the teacher")
    own: Any = ("k", "method", "batch_size", "dtype", "output_dir")
    own = own if recipe is not None else signature(cache).parameters
    asked = {"url": server, "model": served_model, "key_variable": key_variable, "form": server_form}
    with as_options(own, {"teacher": "TEACHER", **SERVER_OPTIONS}):
        served = read_server(asked, k, recipe)
        how = {"k": k, "method": method, "dtype": dtype}
        source: Recipe | tuple[str, dict[str, Any], Path, bool] = (
            recipe if recipe is not None else (teacher, rows, output_dir, trust_remote_code)
        )
        items, size = _write(
            source, served, {name: value for name, value in how.items() if value is not None}, batch_size
        )
    if is_main_process():
        each = size / max(items, 1)
        print(f"{output_dir}: {items:,} outputs of {teacher}, {size / 1e6:.1f} MB, {each:.0f} bytes each")


def _write(
    source: Recipe | tuple[str, Mapping[str, Any], Path, bool],
    served: ServerSection | None,
    how: Mapping[str, Any],
    batch_size: int,
) -> tuple[int, int]:
    """The numbers of outputs and of bytes; a recipe or what stands for it, and the settings that were given."""
    from distill_llm.data.spec import DataSpec
    from distill_llm.pipeline.caching import cache_recipe, cache_teacher, default_settings
    from distill_llm.teachers.cache_format import CacheSettings

    plain = default_settings(served)
    coding = CacheSettings(**{"k": plain.k, "method": plain.method, **how})
    if isinstance(source, Recipe):
        return cache_recipe(source, coding, batch_size)
    teacher, rows, output_dir, trusted = source
    return cache_teacher(teacher, DataSpec(**rows), output_dir, coding, batch_size, trusted, served)


def _recipe(
    name: str, output_dir: Path, settings: list[str], rows: Mapping[str, Any], trust_remote_code: bool
) -> Recipe | None:
    """The recipe of that name (a YAML file, or a shipped one unless a folder is called so), with this cache; else None."""
    if not (name.endswith((".yaml", ".yml")) or (name in recipe_names() and not Path(name).exists())):
        if settings:
            raise InputError(
                "--set", settings[0], fix="leave it out: it changes fields of a recipe, and no recipe is given"
            )
        return None
    rows = {**rows, "trust_remote_code": True} if trust_remote_code else rows
    with as_options({*rows, "data"}):
        fix = "leave it out: the recipe sets it (--set overrides a field)"
        raise_all(
            [InputError("data.path" if field == "path" else field, value, fix=fix) for field, value in rows.items()]
        )
    return load_recipe(name, [*settings, f"teacher.cache={json.dumps(str(output_dir))}"])
