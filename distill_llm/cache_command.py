"""`distill-llm cache`: the command line of teacher caches."""

from pathlib import Path
from typing import Annotated

import typer

from distill_llm.command_group import is_main_process
from distill_llm.errors import InputError, one_of

EXAMPLE = "Example: distill-llm cache my-org/my-llm --task text --data corpus.txt --max-length 1024 --output-dir cache"
DTYPES = ("float32", "bfloat16", "float16")


def cache(
    teacher: Annotated[
        str, typer.Argument(metavar="TEACHER", help="Hub id, folder, GGUF file, or package://PACKAGE/PATH.")
    ],
    task: Annotated[str, typer.Option(help="As in data.task of a recipe.")],
    output_dir: Annotated[Path, typer.Option(help="Folder for the cache; the teacher.cache of a recipe.")],
    data: Annotated[str | None, typer.Option(help="As in data.path of a recipe.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="As in data.max_length of the recipe.")] = 128,
    train_examples: Annotated[int | None, typer.Option(min=1, help="As in the recipe.")] = None,
    holdout_examples: Annotated[int, typer.Option(min=0, help="As in the recipe.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="As in the recipe; of the draws too.")] = 0,
    k: Annotated[int, typer.Option(help="Draws, or most probable tokens, of each output, 1 to 255.")] = 50,
    method: Annotated[
        str, typer.Option(metavar="sampled|topk", help="Unbiased draws, or the most probable.")
    ] = "sampled",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples at once.")] = 8,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="float32|bfloat16|float16", help="Of the teacher; by default bfloat16 on CUDA."),
    ] = None,
) -> None:
    """Write what a teacher says of the training rows to disk, once. The same command again goes on where it stopped."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError("--dtype", dtype, one_of(DTYPES, dtype))
    from distill_llm.teachers.caching import cache_teacher

    items, size = cache_teacher(
        teacher,
        {
            "task": task,
            "path": data,
            "train_examples": train_examples,
            "holdout_examples": holdout_examples,
            "seed": seed,
        },
        output_dir,
        max_length=max_length,
        k=k,
        method=method,
        batch_size=batch_size,
        dtype=dtype,
    )
    if is_main_process():
        print(
            f"{output_dir}: {items:,} outputs of {teacher}, {size / 1e6:.1f} MB, {size / max(items, 1):.0f} bytes each"
        )
