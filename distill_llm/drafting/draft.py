"""A draft of a recipe for a model and data: task and columns found, settings by the kind of model and the number of rows."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from distill_llm.common.errors import InputError
from distill_llm.data.chats import as_turn, in_template
from distill_llm.data.loading import NAMED, read_task, task_names
from distill_llm.data.sources import PACKAGE, read_splits, resolve_path
from distill_llm.data.spec import DataSpec
from distill_llm.drafting.columns import Rows, task_of
from distill_llm.drafting.model import ModelFacts, facts_of_model
from distill_llm.drafting.settings import Setting, settings_for
from distill_llm.drafting.target import Target, cut_for

MEASURED = 500
"""Rows whose tokens are counted."""


@dataclass(frozen=True)
class Wish:
    """What a user asks for.

    Attributes:
        model: Hub id, folder, GGUF file, or package://PACKAGE/PATH.
        data: a file, a folder, a Hub id; None for a task that has its own.
        target: how small or fast the student shall be.
        task: as `data.task`; None: it is guessed.
        columns: our name of a column -> the data's, where the user says so.
        output_dir: the run folder; None: runs/MODEL-DATA.
        trust_remote_code: whether code that the model brings along may run.
    """

    model: str
    data: str | None = None
    target: Target = Target()  # noqa: RUF009 - frozen
    task: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    output_dir: Path | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Draft:
    """A recipe that was made.

    Attributes:
        recipe: the mapping, for `parse_recipe`.
        comments: by dotted field, why it is so.
        said: a line for each thing that was guessed.
    """

    recipe: dict[str, Any]
    comments: Mapping[str, str]
    said: tuple[str, ...]


def draft(wish: Wish) -> Draft:
    """Make a recipe.

    Raises:
        InputError: named as the options of `shrink`: what cannot be opened, reached, or guessed safely.
    """
    if wish.task is not None and wish.task not in task_names():
        raise InputError("task", wish.task, f"one of {', '.join(task_names())}")
    if wish.data is None and wish.task not in NAMED:
        fix = "give a file, a folder or a Hub id with the rows (--data FILE), or a task that has its own (--task sst2)"
        raise InputError("data", None, fix=fix)
    model = facts_of_model(wish.model, wish.trust_remote_code)
    found, train = _rows(wish, model)
    length, why = _length(train, found, model)
    cut, cut_said = cut_for(wish.target, model, length)
    given = settings_for(Setting(model, found.task, len(train), length, cut["keep"]))
    recipe: dict[str, Any] = {
        "description": _description(wish, cut),
        "seed": 0,
        "output_dir": str(wish.output_dir or Path("runs") / _name(wish)),
        "teacher": {"model": wish.model, **given.teacher},
        "data": _data(wish, found) | {"max_length": length},
        "pruning": cut | given.pruning,
        "distillation": given.distillation,
    }
    if wish.trust_remote_code:
        recipe["teacher"]["trust_remote_code"] = True
    if given.final:
        recipe["final"] = given.final
    recipe["evaluation"] = given.evaluation
    comments = {"data.max_length": why, "pruning.keep": cut_said, **given.comments}
    rows = f"{len(train):,} training rows"
    return Draft(recipe, comments, (*found.said, f"{rows}; {why}", *given.said, cut_said))


def _rows(wish: Wish, model: ModelFacts) -> tuple[Rows, Dataset]:
    """Task and columns, and the training rows."""
    if wish.task in NAMED:
        if wish.columns:
            name, column = next(iter(wish.columns.items()))
            raise InputError("columns", f"{name}={column}", fix=f"leave it out: the columns of {wish.task} are known")
        data = read_task(DataSpec(wish.task, wish.data), model.opened.config)
        return Rows(wish.task, {name: name for name in data.task.text_columns}), data.train
    assert wish.data is not None
    rows = read_splits(resolve_path(wish.data, "data.path"))["train"]
    if not len(rows):
        raise InputError("data.path", wish.data, "a file with rows: it has none")
    return task_of(rows, model, wish.task, wish.columns), rows


def _data(wish: Wish, found: Rows) -> dict[str, Any]:
    section: dict[str, Any] = {"task": found.task}
    if wish.data is not None:
        section["path"] = wish.data
    if found.task not in NAMED:
        section["columns"] = dict(found.columns)
    return section | ({"chat": True} if found.chat and "messages" not in found.columns else {})


def _length(train: Dataset, found: Rows, model: ModelFacts) -> tuple[int, str]:
    """`max_length`: what 99 in 100 rows fit in; of documents, which are cut into rows, a usual length."""
    longest = model.longest or 10**9
    if model.writes and found.task == "text":
        length = min(512, longest)
        return length, f"documents are joined and cut into rows of {length} tokens"
    columns = [column for name, column in found.columns.items() if name != "label"]
    some = train.select(range(0, len(train), max(1, len(train) // MEASURED)))
    texts = [_text(row, found, model) for row in some.select_columns(columns)]
    counts = [len(ids) for ids in model.opened.tokenizer(texts)["input_ids"]]
    most = 2048 if model.writes else 512
    length = max(16, min(most, longest, 16 * math.ceil(float(np.percentile(counts, 99)) / 16)))
    fits = sum(count <= length for count in counts) / len(counts)
    return length, f"{100 * fits:.0f}% of the rows have at most {length} tokens; longer ones are cut"


def _text(row: Mapping[str, Any], found: Rows, model: ModelFacts) -> str:
    """All of a row that becomes tokens; of chats with what the chat template adds."""
    if "messages" in found.columns:
        chat = row[found.columns["messages"]]
    elif found.chat:
        chat = [as_turn("user", row[found.columns["prompt"]]), as_turn("assistant", row[found.columns["response"]])]
    else:
        return " ".join(value for value in row.values() if value is not None)
    return in_template(chat, model.opened.tokenizer, {}, "data.columns")


def _name(wish: Wish) -> str:
    """`MODEL-DATA`, of letters that every file system takes."""
    model = wish.model.removeprefix(PACKAGE).split("/")[0] if wish.model.startswith(PACKAGE) else wish.model
    names = [Path(model.rstrip("/")).name.removesuffix(".gguf"), _stem(wish.data) or wish.task or "data"]
    return "-".join(re.sub(r"[^\w.-]+", "_", name) for name in names)


def _stem(data: str | None) -> str:
    return "" if data is None else Path(data.rstrip("/").partition(":")[0]).name.split(".")[0]


def _description(wish: Wish, cut: Mapping[str, Any]) -> str:
    kept = f"{100 * cut['keep']:.0f}% of the {'time' if cut.get('cost') == 'latency' else 'layers'} kept"
    return f"{wish.model} on {wish.data or wish.task}, {kept}"
