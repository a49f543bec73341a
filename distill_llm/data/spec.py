"""What a user says about data, as one object from the door to the place that reads the rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from distill_llm.data.answer_choice import AnswerChoice
from distill_llm.data.files import FileFormat


@dataclass(frozen=True)
class DataSpec:
    """A task and its rows, as a recipe's data section or a command names them; nothing is read yet.

    Attributes:
        task: a GLUE name; `embedded` (the tweets of the quickstart extra); `classification` or `regression` (any labelled
            data); `text` (language modelling: causal for a decoder, else masked); `prompts` (responses to prompts, for a
            decoder); or the name of another kind of task (see `distill_llm.data.kinds`).
        path: a folder in the official GLUE TSV layout, a file (csv, tsv, json, jsonl, parquet, txt), a folder of such
            files (`train.*`, `validation.*`, `test.*`), a Hub id (a configuration after a colon), or
            `package://PKG/PATH`. None for `embedded`, and for GLUE to take the Hub's copy.
        columns: our name of a column -> the data's. Ours are `text`, `text_pair` and `label`; for prompts `prompt` and
            `response`, or `messages`.
        max_length: most tokens of an encoded row.
        train_examples: how many training rows to keep, drawn with `seed`; None for all.
        holdout_examples: how many training rows become `validation`, drawn with `seed` and removed from `train`. Where
            the data have a validation split of their own, how many of its rows to use (0 for all).
        seed: of the draws. The rows of `validation` do not depend on `train_examples`.
        metric: the main metric; None for the task's own. For prompts, `perplexity`, a metric of texts, or one of
            `evaluate` (`rouge:rougeL`).
        max_new_tokens: for prompts whose metric judges generated text, the most tokens to generate.
        join_rows: for text, whether rows are lines of longer documents.
        packing: for prompts, whether short training sequences share rows.
        chat: for prompts, whether to ask and answer in the words of the tokenizer's chat template.
        chat_template_kwargs: for chats, what the template is given beside them, such as `enable_thinking`.
        answers: for prompts, which of several answers of a teacher are kept (see `AnswerChoice`); None: all.
        test_examples: how many test rows to score on, drawn with `seed`; None for all.
        separator: between the columns of .csv and .tsv files (see `FileFormat`).
        encoding: of files of text (see `FileFormat`).
        drop_incomplete: leave out rows that lack a text or a label, in place of an error.
    """

    task: str
    path: str | None = None
    columns: Mapping[str, str] | None = None
    max_length: int = 128
    train_examples: int | None = None
    holdout_examples: int = 0
    seed: int = 0
    metric: str | None = None
    max_new_tokens: int = 64
    join_rows: bool = False
    packing: bool = False
    chat: bool = False
    chat_template_kwargs: Mapping[str, Any] | None = field(default=None, hash=False)
    answers: AnswerChoice | None = None
    test_examples: int | None = None
    separator: str | None = None
    encoding: str | None = None
    drop_incomplete: bool = False

    @property
    def form(self) -> FileFormat:
        """How files are written, as far as the user says so."""
        return FileFormat(self.separator, self.encoding)
