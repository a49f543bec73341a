"""Regression: one real value for a text, or for a pair of texts."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.kinds.base import KINDS, TaskKind, register
from distill_llm.data.labelled import read_labelled, text_encoder
from distill_llm.data.padding import Rows
from distill_llm.data.spec import DataSpec
from distill_llm.data.splitting import Splits
from distill_llm.data.tasks import Task


@register
class Regression(TaskKind):
    """A real value for an example (similarity, a grade), by a head with one output."""

    name = "regression"
    task_name = "regression"
    auto_class = "AutoModelForSequenceClassification"
    head_classes = ("ForSequenceClassification",)
    pipeline_tag = "text-classification"
    metric_inputs = "values"
    problem_type = "regression"
    has_distribution = False

    def load(self, spec: DataSpec, config: PreTrainedConfig | None, training: bool) -> tuple[Task, Splits]:
        """Rows of `text`, `text_pair` if any, and `labels`, which are numbers."""
        data = read_labelled(spec, training)
        return regression(self.name, data.texts), data.with_labels(_numbers)

    def encoder(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
        """Texts between special tokens, cut to `max_length`."""
        return text_encoder(task.text_columns, tokenizer, max_length)

    def predictions(self, outputs: Any, labels: Any) -> tuple[Any, Any]:
        """The single output of each example, and its label: two arrays (B,)."""
        outputs, labels = self.items(outputs, labels)
        return outputs.squeeze(-1), labels


def regression(name: str, text_columns: tuple[str, ...]) -> Task:
    """A task with one real-valued label, scored by rank correlation."""
    return Task(name, KINDS[Regression.name], text_columns, None, ("pearsonr", "spearmanr"), "spearmanr")


def _numbers(values: Sequence[Any], split: str) -> list[float]:
    return [_number(value, split) for value in values]


def _number(value: Any, split: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number):
        raise InputError("data.columns.label", value, f"a number in every row (the {split} split)")
    return number
