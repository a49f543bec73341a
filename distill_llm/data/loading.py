"""One door to all data: what a user says about them in, rows in splits out."""

from dataclasses import fields, replace

from datasets import ClassLabel, Dataset, Value
from transformers import PreTrainedConfig

from distill_llm.common.errors import InputError, one_of
from distill_llm.data.embedded import TASK as EMBEDDED
from distill_llm.data.embedded import load_embedded
from distill_llm.data.glue import GLUE, load_glue
from distill_llm.data.kinds import KINDS, TaskKind
from distill_llm.data.sources import Splits, resolve_path
from distill_llm.data.spec import DataSpec
from distill_llm.data.tasks import Task, TaskData

NAMED: dict[str, Task] = {**GLUE, "embedded": EMBEDDED}
"""Tasks whose rows, columns and labels are known; all others are the user's own rows, read by their kind."""
OF_SOME_KINDS = ("columns", "packing", "chat", "join_rows", "chat_template_kwargs")
"""Fields of a spec that only some kinds take."""


def task_names() -> tuple[str, ...]:
    """What `data.task` may be."""
    return (*NAMED, *dict.fromkeys(kind.task_name for kind in KINDS.values()))


def load_task(spec: DataSpec, config: PreTrainedConfig | None = None, training: bool = True) -> TaskData:
    """The rows of a task, in the splits that training, choosing and reporting use.

    Args:
        spec: which task and rows, and how many.
        config: of the model that the rows are for; None is an encoder's.
        training: False where a model is scored and nothing else: `train` is then `test` over again, and data need no
            training rows.

    Raises:
        InputError: an unknown task, missing data, file or column, a label that does not fit, more rows asked for than
            there are, or a model or setting that the task does not go with.
    """
    kind = _kind(spec.task, config)
    _check_settings(spec, frozenset() if spec.task in NAMED else kind.settings)
    if spec.metric is not None:
        kind.check_metric(spec.metric)
    kind.check(spec, config)
    path = spec.path if spec.path is None else resolve_path(spec.path, "data.path")
    task, splits = _read(replace(spec, path=path), kind, config, training)
    task = kind.scored_by(task, spec.metric)
    _check_labels(kind, splits["test"])
    if not training:
        return TaskData(task, splits["test"], None, splits["test"])
    train, validation = _hold_out(splits, spec.holdout_examples, spec.seed)
    if spec.train_examples is not None:
        if not 1 <= spec.train_examples <= len(train):
            accepted = f"1 to {len(train)} (the number of training rows)"
            raise InputError("data.train_examples", spec.train_examples, accepted)
        train = train.shuffle(seed=spec.seed).select(range(spec.train_examples))
    return TaskData(task, train, validation, splits["test"])


def _kind(name: str, config: PreTrainedConfig | None) -> TaskKind:
    """The kind of a task: of those with this name the first that serves the model, else the first."""
    if name in NAMED:
        return NAMED[name].kind
    kinds = [kind for kind in KINDS.values() if kind.task_name == name]
    if not kinds:
        raise InputError("data.task", name, one_of(task_names(), name))
    return next((kind for kind in kinds if kind.serves(config)), kinds[0])


def _check_settings(spec: DataSpec, taken: frozenset[str]) -> None:
    """Raise InputError where a setting is given that the task does not take."""
    defaults = {each.name: each.default for each in fields(DataSpec)}
    for name in OF_SOME_KINDS:
        value = getattr(spec, name)
        if name in taken or not value or value == defaults[name]:
            continue
        takers = dict.fromkeys(kind.task_name for kind in KINDS.values() if name in kind.settings)
        fix = f"leave it out: {spec.task} does not use it (only {', '.join(takers)})"
        raise InputError(f"data.{name}", value, fix=fix)


def _check_labels(kind: TaskKind, rows: Dataset) -> None:
    """Raise InputError where an example has several labels: no loss is for them."""
    labels = rows.features.get("labels")
    if kind.item == "example" and labels is not None and not isinstance(labels, ClassLabel | Value):
        fix = f"give each example one class or one value: a {kind.name} task cannot be trained with several"
        raise InputError("data.columns.label", rows[0]["labels"], fix=fix)


def _read(spec: DataSpec, kind: TaskKind, config: PreTrainedConfig | None, training: bool) -> tuple[Task, Splits]:
    if spec.task in GLUE:
        return GLUE[spec.task], load_glue(spec.task, spec.path, training)
    if spec.task == EMBEDDED.name:
        if spec.path is not None:
            raise InputError(
                "data.path", spec.path, fix="leave it out: the data of embedded are in the quickstart extra"
            )
        return EMBEDDED, load_embedded()
    if spec.path is None:
        raise InputError("data.path", None, f"a file, a folder or a Hub id: {spec.task!r} needs data")
    return kind.load(spec, config, training)


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
