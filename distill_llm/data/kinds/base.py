"""What a kind of task is, and the table of all kinds."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

import numpy as np
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.architectures.configuration_pruned import stock_config_class
from distill_llm.common.errors import InputError, one_of
from distill_llm.data.padding import Collator, PaddingCollator, Rows
from distill_llm.data.spec import DataSpec
from distill_llm.data.splitting import Splits
from distill_llm.losses.items import ITEMS, VOCABULARY_HEADS
from distill_llm.losses.labels import IGNORED
from distill_llm.losses.units import Kind as Item
from distill_llm.metrics.registry import Inputs, find_metric, metrics_of

if TYPE_CHECKING:
    from distill_llm.data.tasks import Task, TaskData

ProblemType = Literal["regression", "single_label_classification"]


@dataclass(frozen=True)
class TaskKind(ABC):
    """A kind of task. It has no state: two objects of one class are equal.

    Attributes:
        name: of the kind, for messages.
        task_name: what `data.task` calls the user's own rows of this kind; two kinds may share it (see `serves`).
        auto_class: the class of transformers that loads models with its head.
        head_classes: how the names of the classes of such models end.
        pipeline_tag: what the Hub calls the use of such models.
        item: what an output of the head is about (see `distill_llm.losses.items.kind_of`).
        settings: which fields of `DataSpec` it takes, of those that not every kind takes.
        metric_inputs: what its metrics compare; None where the score comes from the loss alone.
        problem_type: what the model's config has under this name.
        is_language_model: whether the outputs are tokens of the vocabulary. Then no class needs a name, and an evaluation
            during training measures the loss alone.
        generates: whether its metrics judge texts that the model generates.
        keeps_head: whether the checkpoint must have the head already, because a new one would be useless.
        changes_inputs: whether the inputs of a row change from epoch to epoch; any token may then occur in them.
        joins_documents: whether documents are joined and cut into rows; how many rows there are shows only after encoding.
        has_distribution: whether the outputs of an item are the logits of one probability distribution.
    """

    name: ClassVar[str]
    task_name: ClassVar[str]
    auto_class: ClassVar[str]
    head_classes: ClassVar[tuple[str, ...]]
    pipeline_tag: ClassVar[str]
    item: ClassVar[Item] = "example"
    settings: ClassVar[frozenset[str]] = frozenset({"columns"})
    metric_inputs: ClassVar[Inputs | None] = None
    problem_type: ClassVar[ProblemType | None] = None
    is_language_model: ClassVar[bool] = False
    generates: ClassVar[bool] = False
    keeps_head: ClassVar[bool] = False
    changes_inputs: ClassVar[bool] = False
    joins_documents: ClassVar[bool] = False
    has_distribution: ClassVar[bool] = True

    @abstractmethod
    def load(self, spec: DataSpec, config: PreTrainedConfig | None, training: bool) -> tuple["Task", Splits]:
        """The task of the user's own rows, and the rows in splits: `train`, `test` and perhaps `validation`.

        The columns of the rows are the task's text columns and `labels`.

        Args:
            spec: with the path of a file or folder, or a Hub id. Its metric is applied afterwards, by `scored_by`.
            config: of the model that the rows are for, or None.
            training: False where data need no training rows.

        Raises:
            InputError: naming the field of the recipe.
        """

    @abstractmethod
    def encoder(self, task: "Task", tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
        """A function from a batch of raw rows to rows of token ids, with `labels` and `length`."""

    def collator(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Collator:
        """A function from encoded rows to a padded batch."""
        return PaddingCollator(tokenizer)

    def missing(self, task: "Task", tokenizer: PreTrainedTokenizerBase) -> str | None:
        """What a tokenizer lacks to make rows of a task, in words, or None."""
        return "a padding token" if tokenizer.pad_token_id is None else None

    def serves(self, config: PreTrainedConfig | None) -> bool:
        """Whether the kind is for a model with this config (None: an encoder)."""
        return True

    def check(self, spec: DataSpec, config: PreTrainedConfig | None) -> None:
        """Raise InputError where the user's settings do not fit each other or the model; no row is read."""
        return

    def check_rows(self, data: "TaskData", tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise InputError where a look at some of the raw rows shows that they cannot be encoded."""
        return

    def outputs(self, result: Any) -> Tensor:
        """What `predictions` takes of the result of a model's forward: the logits."""
        return result.logits  # type: ignore[no-any-return]

    def predictions(self, outputs: Any, labels: Any) -> tuple[Any, Any]:
        """Predictions and references, one of each for an item, from the outputs of a model and its labels.

        Args:
            outputs: logits (B, C), or (B, T, C) with an output per token.
            labels: (B,), or (B, T) with -100 where there is none; such items are left out.

        Returns:
            Two arrays (items,): the classes with the largest logits, and the labels.
        """
        outputs, labels = self.items(outputs, labels)
        return outputs.argmax(-1), labels

    def items(self, outputs: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        """Outputs (items, C) and labels (items,) of the items with a label."""
        outputs, labels = np.asarray(outputs), np.asarray(labels)
        if self.item == "example":
            return outputs, labels
        return outputs[labels != IGNORED], labels[labels != IGNORED]

    def has_head(self, classes: Iterable[str] | None) -> bool:
        """Whether a model of one of these classes (`architectures` of its config) has the head."""
        return any(name.endswith(self.head_classes) for name in classes or ())

    @property
    def auto(self) -> Any:
        """The auto class itself."""
        return getattr(transformers, self.auto_class)

    def stock_class(self, config: PreTrainedConfig) -> Any:
        """The class of transformers for models of a family with the head; None where the family has none."""
        return self.auto._model_mapping.get(stock_config_class(type(config)), None)

    def check_metric(self, metric: str) -> None:
        """Raise InputError, naming `evaluation.metric`, where the kind has no such metric."""
        known = metrics_of([self.metric_inputs] if self.metric_inputs else [])
        if not known:
            fix = f"leave it out: a {self.task_name} task is scored by the loss alone"
            raise InputError("evaluation.metric", metric, fix=fix)
        if metric not in known:
            raise InputError("evaluation.metric", metric, one_of(known, metric))

    def scored_by(self, task: "Task", metric: str | None) -> "Task":
        """The task with a metric of the user's choice as its main one; None: as it is."""
        if metric is None:
            return task
        metrics = tuple(dict.fromkeys((*task.metrics, metric)))
        higher = find_metric(metric).higher_is_better
        return replace(task, metrics=metrics, main_metric=metric, higher_is_better=higher)

    def usage(self, config: Mapping[str, Any]) -> tuple[str, str]:
        """How a student is tried, as Python: an expression for a text, and lines that use `model`, `inputs` and `tokenizer`.

        Args:
            config: the student's config.json.
        """
        return '"A sentence to try it on."', "    logits = model(**inputs).logits\nprint(logits)\n"


KINDS: dict[str, TaskKind] = {}
"""All kinds by name, in the order in which messages list them."""

Class = TypeVar("Class", bound=type[TaskKind])


def register(kind: Class) -> Class:
    """Decorator: puts a kind of task into KINDS, and a head that is new to the losses into their table.

    Raises:
        InputError: a name that is taken, or a `problem_type` that no loss is for.
    """
    if kind.name in KINDS:
        raise InputError("kind", kind.name, fix="choose another name: there is a kind of this name")
    if kind.problem_type not in (None, *get_args(ProblemType)):
        accepted = f"{' or '.join(get_args(ProblemType))}: an item has one class or one value"
        raise InputError("problem_type", kind.problem_type, accepted)
    KINDS[kind.name] = kind()
    for head in kind.head_classes:
        if not any(known.endswith(head) for known in ITEMS):  # of the heads LMHeadModel, some can be trained
            ITEMS[head] = kind.item
            if kind.is_language_model:
                VOCABULARY_HEADS.add(head)
    return kind


def kind_of_head(classes: Iterable[str] | None) -> TaskKind | None:
    """The first kind whose head models of these classes have."""
    classes = tuple(classes or ())
    return next((kind for kind in KINDS.values() if kind.has_head(classes)), None)
