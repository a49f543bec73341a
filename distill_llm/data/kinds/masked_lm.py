"""Masked language modelling: plain text for encoders."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from distill_llm.data.decoders import is_decoder
from distill_llm.data.documents import read_texts
from distill_llm.data.kinds.base import KINDS, TaskKind, register
from distill_llm.data.masked import MaskingCollator, masked_packer
from distill_llm.data.padding import Collator, Rows
from distill_llm.data.spec import DataSpec
from distill_llm.data.splitting import Splits
from distill_llm.data.tasks import Task


@register
class MaskedLM(TaskKind):
    """Tokens that are hidden in a text (BERT, Devlin et al. 2018, 3.1)."""

    name = "masked_lm"
    task_name = "text"
    auto_class = "AutoModelForMaskedLM"
    head_classes = ("ForMaskedLM",)
    pipeline_tag = "fill-mask"
    item = "token"
    settings = frozenset({"columns", "join_rows"})
    is_language_model = True
    changes_inputs = True
    joins_documents = True

    def load(self, spec: DataSpec, config: PreTrainedConfig | None, training: bool) -> tuple[Task, Splits]:
        """Rows with one column of documents."""
        column, splits = read_texts(spec, training)
        return masked_lm("text", column), splits

    def encoder(self, task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
        """Documents joined and cut into rows of `max_length` tokens."""
        return masked_packer(task.text_columns[0], tokenizer, max_length)

    def collator(self, tokenizer: PreTrainedTokenizerBase, seed: int) -> Collator:
        """Hides tokens, others in every epoch."""
        return MaskingCollator(tokenizer, seed)

    def missing(self, task: Task, tokenizer: PreTrainedTokenizerBase) -> str | None:
        """A padding token, or the mask token."""
        return super().missing(task, tokenizer) or ("a mask token" if tokenizer.mask_token_id is None else None)

    def serves(self, config: PreTrainedConfig | None) -> bool:
        """Encoders."""
        return config is None or not is_decoder(config)

    def usage(self, config: Mapping[str, Any]) -> tuple[str, str]:
        """Prints a text with its mask filled in."""
        text, lines = 'f"A good film is a {tokenizer.mask_token} thing."', super().usage(config)[1]
        return text, lines.replace("print(logits)", "print(tokenizer.batch_decode(logits.argmax(-1)))")


def masked_lm(name: str, text_column: str) -> Task:
    """Masked language modelling on one column of text, scored by the loss in nats per masked token."""
    return Task(name, KINDS[MaskedLM.name], (text_column,), None, (), "loss", higher_is_better=False)
