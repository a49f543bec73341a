"""Classification: one class for a text, or for a pair of texts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.common.notices import tell
from distill_llm.data.kinds.base import KINDS, TaskKind, register
from distill_llm.data.labelled import LabelledRows, read_labelled, text_encoder
from distill_llm.data.padding import Rows
from distill_llm.data.spec import DataSpec
from distill_llm.data.splitting import Splits, same_class
from distill_llm.data.tasks import Task, label_names
from distill_llm.metrics.registry import find_metric

SHOWN = 10
"""How many classes a line names."""


class OneClass(InputError):
    """Rows of which all have the same class, or that have none.

    Attributes:
        names: of the classes there are.
    """

    def __init__(self, column: str, names: Sequence[str]):
        self.names = tuple(names)
        only = "".join(f" (they have only {name!r})" for name in names)
        super().__init__("data.columns.label", column, f"at least two classes in the training rows{only}")


@register
class Classification(TaskKind):
    """One of several classes for an example (sentiment, entailment, topics)."""

    name = "classification"
    task_name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    head_classes = ("ForSequenceClassification",)
    pipeline_tag = "text-classification"
    metric_inputs = "classes"
    problem_type = "single_label_classification"

    def load(self, spec: DataSpec, config: PreTrainedConfig | None, training: bool) -> tuple[Task, Splits]:
        """Rows of `text`, `text_pair` if any, and `labels`.

        Classes are in the order of the model that the data are for, where it has the same ones by name. Else they come from
        the data: a `ClassLabel` column's own, else the sorted values of the training rows. Without training rows, data may
        have some of the model's classes only, by name or number.
        """
        data = read_labelled(spec, training, classes=True)
        names, ids = _task_classes(data, _classes_of(config))
        task = classification(self.name, data.texts, names, ("accuracy", "f1"))
        return task, data.with_labels(lambda values, split: _class_ids(values, ids, split))

    def encoder(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
        """Texts between special tokens, cut to `max_length`."""
        return text_encoder(task.text_columns, tokenizer, max_length)

    def usage(self, config: Mapping[str, Any]) -> tuple[str, str]:
        """Prints the class of a text; of a student with one output (a regression) the output."""
        # transformers leaves the labels out of config.json where there are two
        classes = len(config.get("id2label") or (0, 1))
        text, lines = super().usage(config)
        if config.get("problem_type") == "regression" or classes == 1:
            return text, lines
        return text, lines.replace("print(logits)", "print(model.config.id2label[logits.argmax(-1).item()])")


def classification(
    name: str,
    text_columns: tuple[str, ...],
    label_names: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
) -> Task:
    """A classification task; its score is the first of its metrics."""
    higher = find_metric(metrics[0]).higher_is_better
    return Task(name, KINDS[Classification.name], text_columns, label_names, metrics, metrics[0], higher)


def _classes_of(config: PreTrainedConfig | None) -> tuple[str, ...]:
    """The classes of a model: their names, else their numbers as text."""
    if config is None:
        return ()
    return label_names(config) or tuple(map(str, range(config.num_labels or 0)))


def _class_values(rows: Dataset, column: str) -> list[Any]:
    values = {same_class(value) for value in rows.unique(column)}
    if None in values or "" in values or any(isinstance(value, float) for value in values):
        raise InputError("data.columns.label", column, "a column with a class (a word or an integer) in every row")
    return sorted(values)


def _class_names(rows: Dataset, column: str) -> dict[Any, str]:
    """What each value of the column is called: by its ClassLabel, else by itself."""
    feature = rows.features[column]
    if isinstance(feature, ClassLabel):
        return dict(enumerate(feature.names))
    return {value: str(value) for value in _class_values(rows, column)}


def _task_classes(data: LabelledRows, known: Sequence[str]) -> tuple[tuple[str, ...], dict[Any, int]]:
    """Names of the classes in the order of their ids, and the id of each value of the column."""
    rows, column = data.splits.get("train", data.splits["test"]), data.names["label"]
    names = _class_names(rows, column)
    ids = _ids_by_name(names, known)
    some = "train" not in data.splits and not isinstance(rows.features[column], ClassLabel)
    if known and ids is not None and (some or len(ids) == len(known) > 1):
        return tuple(known), ids
    if known and some and all(type(value) is int and 0 <= value < len(known) for value in names):
        return tuple(known), {value: value for value in names}
    if len(names) < 2:
        raise OneClass(column, list(names.values()))
    if any(isinstance(value, str) for value in names):  # words, so their order is ours, and a model may have another
        _tell_order(list(names.values()), known)
    return tuple(dict.fromkeys(names.values())), {value: number for number, value in enumerate(names)}


def _tell_order(names: Sequence[str], known: Sequence[str]) -> None:
    """Say which class id each word gets, where neither the data nor the model says it."""
    shown = ", ".join(f"{name}={number}" for number, name in enumerate(names[:SHOWN]))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    model = (
        "names no classes" if not known or [*known] == [*map(str, range(len(known)))] else "has classes of other names"
    )
    tell(
        f"labels: {shown}{more}, in alphabetical order, because the model {model}; for another order write ids as labels"
    )


def _ids_by_name(names: Mapping[Any, str], known: Sequence[str]) -> dict[Any, int] | None:
    """The id of each value in a model that has a class of that name, in capitals or not; None where one has none."""
    order, given = ([name.casefold() for name in each] for each in (known, names.values()))
    if not {*given} <= {*order} or any(len({*each}) < len(each) for each in (order, given)):
        return None
    return {value: order.index(name) for value, name in zip(names, given, strict=True)}


def _class_ids(values: Sequence[Any], ids: Mapping[Any, int], split: str) -> list[int]:
    given = [same_class(value) for value in values]
    if unknown := [value for value in given if value not in ids]:
        accepted = f"the classes {', '.join(map(str, ids))} of the training rows (found in the {split} split)"
        raise InputError("data.columns.label", unknown[0], accepted)
    return [ids[value] for value in given]
