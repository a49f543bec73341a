"""One door to all data: what a user says about them in, rows in splits out."""

from dataclasses import fields, replace

from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedConfig

from distill_llm.common.errors import InputError, as_arguments, one_of
from distill_llm.data.embedded import TASK as EMBEDDED
from distill_llm.data.embedded import load_embedded
from distill_llm.data.glue import GLUE, MISMATCHED, load_glue
from distill_llm.data.kinds import KINDS, TaskKind
from distill_llm.data.sources import resolve_path
from distill_llm.data.spec import DataSpec
from distill_llm.data.splitting import Splits, set_apart
from distill_llm.data.tasks import Task, TaskData
from distill_llm.data.unsupported import unsupported_task

NAMED: dict[str, Task] = {**GLUE, MISMATCHED.name: MISMATCHED, "embedded": EMBEDDED}
"""Tasks whose rows, columns and labels are known; all others are the user's own rows, read by their kind."""
OF_SOME_KINDS = ("columns", "packing", "chat", "join_rows", "chat_template_kwargs", "answers")
"""Fields of a spec that only some kinds take."""
OF_OWN_ROWS = ("separator", "encoding", "drop_incomplete")
"""Fields of a spec that every kind takes, for the user's own rows."""


def task_names() -> tuple[str, ...]:
    """What `data.task` may be."""
    return (*NAMED, *dict.fromkeys(kind.task_name for kind in KINDS.values()))


def load_task(spec: DataSpec, config: PreTrainedConfig | None = None, training: bool = True) -> TaskData:
    """As `read_task`, with faults under the names that `DataSpec` has for its fields: `path`, `columns.text`."""
    try:
        return read_task(spec, config, training)
    except InputError as error:
        raise as_arguments(error, ("data", "evaluation")) from error


def read_task(spec: DataSpec, config: PreTrainedConfig | None = None, training: bool = True) -> TaskData:
    """The rows of a task, in the splits that training, choosing and reporting use.

    Args:
        spec: which task and rows, and how many.
        config: of the model that the rows are for; None is an encoder's.
        training: False where a model is scored and nothing else: `train` is then `test` over again, and data need no
            training rows.

    Raises:
        InputError: under the names of a recipe's fields: an unknown task, missing data, file or column, a label that does not
            fit, more rows asked for than there are, or a model or setting that the task does not go with.
    """
    kind = _kind(spec.task, config)
    _check_settings(spec, frozenset() if spec.task in NAMED else kind.settings | set(OF_OWN_ROWS))
    if spec.metric is not None:
        kind.check_metric(spec.metric)
    kind.check(spec, config)
    path = spec.path if spec.path is None else resolve_path(spec.path, "data.path")
    task, splits = _read(replace(spec, path=path), kind, config, training)
    task = kind.scored_by(task, spec.metric)
    _check_labels(kind, splits["test"])
    test = _some(splits["test"], spec.test_examples, "test", spec.seed)
    if not training:
        return TaskData(task, test, None, test)
    train, validation = _hold_out(task, splits, spec.holdout_examples, spec.seed)
    return TaskData(task, _some(train, spec.train_examples, "train", spec.seed), validation, test)


def _some(rows: Dataset, count: int | None, split: str, seed: int) -> Dataset:
    """So many rows, drawn with a seed; None: all, as they are."""
    if count is None:
        return rows
    if not 1 <= count <= len(rows):
        named = {"train": "training"}.get(split, split)
        raise InputError(f"data.{split}_examples", count, f"1 to {len(rows)} (the number of {named} rows)")
    return set_apart(rows, count, seed)[1]


def _kind(name: str, config: PreTrainedConfig | None) -> TaskKind:
    """The kind of a task: of those with this name the first that serves the model, else the first."""
    if name in NAMED:
        return NAMED[name].kind
    kinds = [kind for kind in KINDS.values() if kind.task_name == name]
    if not kinds and (what := unsupported_task(name)) is not None:
        fix = f"choose a supported task ({', '.join(task_names())}): {what} is not supported"
        raise InputError("data.task", name, fix=fix)
    if not kinds:
        raise InputError("data.task", name, one_of(task_names(), name))
    return next((kind for kind in kinds if kind.serves(config)), kinds[0])


def _check_settings(spec: DataSpec, taken: frozenset[str]) -> None:
    """Raise InputError where a setting is given that the task does not take."""
    defaults = {each.name: each.default for each in fields(DataSpec)}
    for name in (*OF_SOME_KINDS, *OF_OWN_ROWS):
        value = getattr(spec, name)
        if name in taken or not value or value == defaults[name]:
            continue
        takers = dict.fromkeys(kind.task_name for kind in KINDS.values() if name in {*kind.settings, *OF_OWN_ROWS})
        fix = f"leave it out: {spec.task} does not use it (only {', '.join(takers)})"
        raise InputError(f"data.{name}", value, fix=fix)


def _check_labels(kind: TaskKind, rows: Dataset) -> None:
    """Raise InputError where an example has several labels: no loss is for them."""
    labels = rows.features.get("labels")
    if kind.item == "example" and labels is not None and not isinstance(labels, ClassLabel | Value):
        fix = f"give each example one class or one value: a {kind.name} task cannot be trained with several"
        raise InputError("data.columns.label", rows[0]["labels"], fix=fix)


def _read(spec: DataSpec, kind: TaskKind, config: PreTrainedConfig | None, training: bool) -> tuple[Task, Splits]:
    if spec.task in GLUE or spec.task == MISMATCHED.name:
        return NAMED[spec.task], load_glue(spec.task, spec.path, training)
    if spec.task == EMBEDDED.name:
        if spec.path is not None:
            raise InputError(
                "data.path", spec.path, fix="leave it out: the data of embedded are in the quickstart extra"
            )
        return EMBEDDED, load_embedded()
    if spec.path is None:
        raise InputError("data.path", None, f"a file, a folder or a Hub id: {spec.task!r} needs data")
    return kind.load(spec, config, training)


def _hold_out(task: Task, splits: Splits, examples: int, seed: int) -> tuple[Dataset, Dataset | None]:
    train, own = splits["train"], splits.get("validation")
    available = len(own) if own is not None else len(train) - 1
    if not 0 <= examples <= available:
        raise InputError("data.holdout_examples", examples, f"0 to {available}")
    if own is not None:
        return train, own.select(range(examples)) if examples else own
    if not examples:
        return train, None
    classes = train["labels"][:] if task.label_names and task.kind.item == "example" else None
    return set_apart(train, examples, seed, classes)
