"""What a task is (its text columns, its labels, the metrics it is judged by), and a task with its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from transformers import PreTrainedConfig

from distill_llm.common.errors import InputError

if TYPE_CHECKING:
    from distill_llm.data.kinds.base import TaskKind


@dataclass(frozen=True)
class Task:
    """One task, independent of where its rows come from.

    Attributes:
        name: what a recipe calls it (`sst2`, `embedded`, `text`, ...).
        kind: one of `distill_llm.data.kinds.KINDS`, which says how rows of the task are read, encoded and scored.
        text_columns: the columns that are tokenized, in order.
        label_names: the class names, in the order of the class ids; None where there are no classes.
        metrics: names of its metrics (`distill_llm.metrics.METRICS`), the main one first; of language models, those that
            judge generated text, which may be of `evaluate`.
        main_metric: the metric that a score, a retention or a choice refers to.
        higher_is_better: whether a larger main metric is better.
        max_new_tokens: most tokens to generate for a response, where `metrics` judge responses.
        packing: whether short training sequences share rows.
        chat_template_kwargs: what the chat template is given beside the chats that `messages` holds; plain JSON.
    """

    name: str
    kind: "TaskKind"
    text_columns: tuple[str, ...]
    label_names: tuple[str, ...] | None
    metrics: tuple[str, ...]
    main_metric: str
    higher_is_better: bool = True
    max_new_tokens: int = 64
    packing: bool = False
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def is_language_model(self) -> bool:
        """Whether outputs are tokens of the vocabulary (see `TaskKind`)."""
        return self.kind.is_language_model

    @property
    def generates(self) -> bool:
        """Whether the model generates responses to be scored: metrics judge them, not their perplexity alone."""
        return self.kind.generates and bool(self.metrics)

    @property
    def num_labels(self) -> int:
        """Outputs of the task's head: the number of classes, or 1."""
        return len(self.label_names) if self.label_names else 1


@dataclass(frozen=True)
class TaskData:
    """A task with its rows, raw or encoded.

    Raw rows have the task's text columns and `labels` (an integer class id or a float; absent for language modelling).

    Attributes:
        task: what the rows mean.
        train: rows to learn from, without those of `validation`.
        validation: rows for choices (criteria, epochs, rates), never reported; None where none were asked for.
        test: rows that scores are reported on. For GLUE it is the official development set, as in the literature.
    """

    task: Task
    train: Dataset
    validation: Dataset | None
    test: Dataset


def label_names(config: PreTrainedConfig) -> tuple[str, ...] | None:
    """The names of a model's classes in order; None where it has none but transformers' LABEL_0, LABEL_1, ..."""
    names = tuple(str(name) for _, name in sorted((config.id2label or {}).items()))
    return None if any(name.startswith("LABEL_") for name in names) else names


def class_name_faults(
    given: Sequence[str] | None, wanted: Sequence[str] | None, field: str, model: str, hint: str = ""
) -> list[InputError]:
    """A fault where a model names its classes otherwise than the one that it is compared with.

    Args:
        given, wanted: names in the order of the classes; None: a model without names, which agrees with any.
        field: what gave the model.
        model: what it is called.
        hint: what else would help, in words that end the message.
    """
    if not given or not wanted or len(wanted) < 2 or same_names(given, wanted):
        return []
    return [InputError(field, f"{model} with labels {list(given)}", f"labels {list(wanted)}, in this order{hint}")]


def class_order(
    given: Sequence[str] | None, wanted: Sequence[str] | None, field: str, model: str
) -> tuple[int, ...] | None:
    """Where a model has each of the wanted classes, by name; None where they are in this order, or have no names.

    Args:
        given, wanted, field, model: as of `class_name_faults`.

    Raises:
        InputError: the names are others.
    """
    if not class_name_faults(given, wanted, field, model):
        return None
    assert given is not None and wanted is not None
    own, names = ([name.casefold() for name in each] for each in (given, wanted))
    if sorted(own) != sorted(names) or len(set(own)) < len(own):
        raise InputError(field, f"{model} with labels {list(given)}", f"labels {list(wanted)}, in any order")
    return tuple(own.index(name) for name in names)


def same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two models call their classes the same, in the same order, in capitals or not."""
    return [name.casefold() for name in one] == [name.casefold() for name in other]
