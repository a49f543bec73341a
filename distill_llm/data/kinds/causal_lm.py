"""Causal language modelling: plain text for decoders."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.data.causal import CausalCollator, document_packer
from distill_llm.data.decoders import is_decoder
from distill_llm.data.documents import read_texts
from distill_llm.data.kinds.base import KINDS, TaskKind, register
from distill_llm.data.padding import Collator, Rows
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import document_end
from distill_llm.data.splitting import Splits
from distill_llm.data.tasks import Task


class Decoding(TaskKind):
    """What is the same for all tasks whose model predicts the next token."""

    auto_class = "AutoModelForCausalLM"
    head_classes = ("ForCausalLM", "LMHeadModel")
    pipeline_tag = "text-generation"
    item = "next_token"
    is_language_model = True
    keeps_head = True

    def collator(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Collator:
        """Pads on the right, whether the tokenizer has a padding token or not."""
        return CausalCollator(tokenizer)

    def missing(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """A token that ends a text."""
        return "an EOS or BOS token, to end a text" if document_end(tokenizer) is None else None

    def usage(self, config: Mapping[str, Any]) -> tuple[str, str]:
        """Prints how the student goes on with a text."""
        lines = "    ids = model.generate(**inputs, max_new_tokens=32)\n"
        return super().usage(config)[0], f"{lines}print(tokenizer.decode(ids[0], skip_special_tokens=True))\n"


@register
class CausalLM(Decoding):
    """The next token of documents."""

    name = "causal_lm"
    task_name = "text"
    settings = frozenset({"columns", "join_rows"})
    joins_documents = True

    def load(self, spec: DataSpec, config: PreTrainedConfig | None, training: bool) -> tuple[Task, Splits]:
        """Rows with one column of documents."""
        column, splits = read_texts(spec, training)
        return causal_lm("text", column), splits

    def encoder(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
        """Documents joined and cut into rows of `max_length` tokens."""
        return document_packer(task.text_columns[0], tokenizer, max_length)

    def serves(self, config: PreTrainedConfig | None) -> bool:
        """Decoders."""
        return config is not None and is_decoder(config)


def causal_lm(name: str, text_column: str) -> Task:
    """Causal language modelling on one column of text, scored by perplexity."""
    return Task(name, KINDS[CausalLM.name], (text_column,), None, (), "perplexity", higher_is_better=False)
