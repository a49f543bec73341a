"""Prompts: causal language modelling of responses alone, and the metrics of generated ones."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.chats import template_faults
from distill_llm.data.decoders import is_decoder, packing_faults
from distill_llm.data.kinds.base import KINDS, register
from distill_llm.data.kinds.causal_lm import Decoding
from distill_llm.data.padding import Rows
from distill_llm.data.prompt_encoder import CHAT, PAIR, PromptEncoder
from distill_llm.data.prompts import check_first_rows, read_prompts
from distill_llm.data.spec import DataSpec
from distill_llm.data.splitting import Splits
from distill_llm.data.tasks import Task, TaskData
from distill_llm.metrics.modules import PERPLEXITY, prefers_higher


@register
class Prompts(Decoding):
    """The response to a prompt, or the last answer of a chat."""

    name = "prompts"
    task_name = "prompts"
    settings = frozenset({"columns", "packing", "chat", "chat_template_kwargs", "answers"})
    metric_inputs = "texts"
    generates = True

    def load(self, spec: DataSpec, config: PreTrainedConfig | None, training: bool) -> tuple[Task, Splits]:
        """Rows with the columns `prompt` and `response`, or with `messages`."""
        names, splits = read_prompts(spec, training)
        given = spec.chat_template_kwargs
        raise_all(template_faults(given, names == CHAT, "data.chat_template_kwargs"))
        return prompts(names, PERPLEXITY, spec.max_new_tokens, spec.packing, given), splits

    def check(self, spec: DataSpec, config: PreTrainedConfig | None) -> None:
        """Only decoders can answer, and only some of them keep packed rows apart."""
        if config is None:
            return
        if not is_decoder(config):
            fix = f"choose text, classification or regression: {config.model_type} models cannot answer prompts"
            raise InputError("data.task", spec.task, fix=fix)
        if spec.packing:
            raise_all(packing_faults(config.model_type, "data.packing", given=True))

    def check_metric(self, metric: str) -> None:
        """Perplexity, a metric of texts, or a module of `evaluate` that compares texts."""
        if metric != PERPLEXITY:
            prefers_higher(metric)

    def scored_by(self, task: Task, metric: str | None) -> Task:
        """The task with one metric of generated responses; None or perplexity: nothing is generated."""
        if metric in (None, PERPLEXITY):
            return task
        name = metric.rpartition("/")[2]
        return replace(task, metrics=(metric,), main_metric=name, higher_is_better=prefers_higher(metric))

    def check_rows(self, data: TaskData, tokenizer: PreTrainedTokenizerBase) -> None:
        """The first rows can be encoded."""
        check_first_rows(data, tokenizer)

    def encoder(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
        """Prompt and response in a row, with labels at the response."""
        return PromptEncoder(task, tokenizer, max_length)

    def missing(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """A token that ends a text, or the template of chats."""
        template = (
            "a chat template, for messages" if task.text_columns == CHAT and not tokenizer.chat_template else None
        )
        return super().missing(task, tokenizer) or template


def prompts(
    columns: tuple[str, ...] = PAIR,
    metric: str = PERPLEXITY,
    max_new_tokens: int = 64,
    packing: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Task:
    """Responses to prompts, scored by their perplexity or by a metric of generated ones.

    Args:
        columns: `("prompt", "response")` or `("messages",)`.
        metric: `perplexity`, a metric of texts, or a module of `evaluate` (see `distill_llm.metrics.modules.text_score`).
    """
    kind = KINDS[Prompts.name]
    task = Task(
        "prompts", kind, columns, None, (), PERPLEXITY, False, max_new_tokens, packing, chat_template_kwargs or {}
    )
    return kind.scored_by(task, metric)
