"""What a task is: its text columns, its labels and the metrics it is judged by; the nine GLUE tasks as a table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Task:
    """One task, independent of where its rows come from.

    Attributes:
        name: what a recipe calls it (`sst2`, `embedded`, `text`, ...).
        kind: `classification`, `regression`, `masked_lm`, `causal_lm`, or `prompts` (causal LM of responses alone).
        text_columns: the one or two columns that are tokenized, in order.
        label_names: the class names, in the order of the class ids; None where there are no classes.
        metrics: names of the metric modules in `distill_llm.metrics.registry`; of language models, those that judge
            generated text, which may be of `evaluate`.
        main_metric: the metric that a score, a retention or a choice refers to.
        higher_is_better: whether a larger main metric is better.
        max_new_tokens: most tokens to generate for a response, where `metrics` judge them.
        packing: whether short training sequences share rows.
        chat_template_kwargs: what the chat template is given beside the chats that `messages` holds; plain JSON.
    """

    name: str
    kind: str
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
        """Whether outputs are tokens: labels stand at tokens, and a Trainer's evaluation knows the loss alone."""
        return self.kind in ("masked_lm", "causal_lm", "prompts")

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


def same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two models call their classes the same, in the same order, in capitals or not."""
    return [name.casefold() for name in one] == [name.casefold() for name in other]


def classification(
    name: str,
    text_columns: tuple[str, ...],
    label_names: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    main_metric: str | None = None,
) -> Task:
    """A classification task whose score is its first metric unless `main_metric` says otherwise."""
    return Task(name, "classification", text_columns, label_names, metrics, main_metric or metrics[0])


def regression(name: str, text_columns: tuple[str, ...]) -> Task:
    """A task with one real-valued label, scored by rank correlation."""
    return Task(name, "regression", text_columns, None, ("pearsonr", "spearmanr"), "spearmanr")


def masked_lm(name: str, text_column: str) -> Task:
    """Masked language modelling on one column of text, scored by the loss in nats per masked token."""
    return Task(name, "masked_lm", (text_column,), None, (), "loss", higher_is_better=False)


def causal_lm(name: str, text_column: str) -> Task:
    """Causal language modelling on one column of text, scored by perplexity."""
    return Task(name, "causal_lm", (text_column,), None, (), "perplexity", higher_is_better=False)


def prompts(
    columns: tuple[str, ...] = ("prompt", "response"),
    metric: str = "perplexity",
    max_new_tokens: int = 64,
    packing: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    higher_is_better: bool = True,
) -> Task:
    """Responses to prompts, scored by their perplexity or by a metric of generated ones.

    Args:
        columns: `("prompt", "response")` or `("messages",)`.
        metric: one of PROMPT_METRICS, or another of `evaluate` (see `distill_llm.metrics.registry.text_score`).
        higher_is_better: by that other one.
    """
    judged = () if metric == "perplexity" else (metric,)
    generated = (judged, metric.rpartition("/")[2], bool(judged) and higher_is_better, max_new_tokens)
    return Task(
        "prompts", "prompts", columns, None, *generated, packing, chat_template_kwargs=chat_template_kwargs or {}
    )


_PAIR = ("sentence1", "sentence2")
_ENTAILS = ("entailment", "not_entailment")

GLUE: dict[str, Task] = {
    task.name: task
    for task in (
        classification("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation", "accuracy")),
        classification("sst2", ("sentence",), ("negative", "positive")),
        classification("mrpc", _PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
        regression("stsb", _PAIR),
        classification("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
        classification("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
        classification("qnli", ("question", "sentence"), _ENTAILS),
        classification("rte", _PAIR, _ENTAILS),
        classification("wnli", _PAIR, ("not_entailment", "entailment")),
    )
}
"""The nine GLUE tasks (Wang et al. 2018), columns and class ids as in the Hub's `nyu-mll/glue`."""
