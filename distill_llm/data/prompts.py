"""Prompts with their responses, or chats: from files to token ids in which only the response has labels."""

from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError
from distill_llm.data.causal import as_rows
from distill_llm.data.chats import answered, as_chats, is_chat
from distill_llm.data.complete import complete
from distill_llm.data.labelled import check_columns, check_texts, column_names
from distill_llm.data.padding import Rows
from distill_llm.data.sources import read_splits
from distill_llm.data.spec import DataSpec
from distill_llm.data.special_tokens import document_end, special_ends
from distill_llm.data.splitting import Splits, with_test
from distill_llm.data.tasks import Task, TaskData
from distill_llm.losses.labels import IGNORED

PAIR = ("prompt", "response")
CHAT = ("messages",)
FIRST = 100  # rows of a split that are tried in the template before any work


def read_prompts(spec: DataSpec, training: bool = True) -> tuple[tuple[str, ...], Splits]:
    """Rows with the columns `prompt` and `response`, or with `messages`.

    Chats are taken where the columns of `spec` name `messages`, or where they name nothing and the data have `messages` but
    no `prompt`. With `spec.chat`, prompts and responses become chats: the user asks, the assistant answers. Splits are made
    as by `read_labelled`.

    Returns:
        Our names of the columns, and the splits.

    Raises:
        InputError: a column is missing or is not text, or a chat does not end with an answer of the assistant.
    """
    assert spec.path is not None
    columns, splits = spec.columns, read_splits(spec.path, training=training, form=spec.form)
    present = next(iter(splits.values())).column_names
    chats = "messages" in (columns or ()) or (not columns and "messages" in present and "prompt" not in present)
    names = column_names(columns, CHAT if chats else PAIR, CHAT if chats else PAIR)
    for split, rows in splits.items():
        check_columns(rows, names, split)
        splits[split] = rows = complete(rows, names, split, spec.drop_incomplete)
        if chats:
            _check_chats(rows, names["messages"], split)
        else:
            check_texts(rows, names, split)
    standard = {column: name for name, column in names.items() if column != name}
    kept = {
        split: rows.select_columns(list(names.values())).rename_columns(standard)
        for split, rows in with_test(splits).items()
    }
    if chats or not spec.chat:
        return tuple(names), kept
    asked = {"batched": True, "remove_columns": list(PAIR), "desc": "Making chats"}
    return CHAT, {split: rows.map(as_chats, **asked) for split, rows in kept.items()}


def _check_chats(rows: Dataset, column: str, split: str) -> None:
    for chat in rows[column]:
        if not (is_chat(chat) and len(chat) > 1 and chat[-1]["role"] == "assistant"):
            accepted = f"chats of at least 2 turns with role and content, the last by the assistant (the {split} split)"
            raise InputError("data.columns.messages", column, accepted)


def check_chats(data: TaskData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError if the tokenizer has a chat template that refuses one of the first chats of a split."""
    if data.task.text_columns != CHAT or not tokenizer.chat_template:
        return
    for rows in (data.train, data.test):
        for chat in rows.select(range(min(FIRST, len(rows))))["messages"]:
            answered(chat, tokenizer, data.task.chat_template_kwargs, "data.path")


def prompt_encoder(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Rows], Rows]:
    """A function from raw rows to token ids with labels at the response and at the EOS that ends it.

    Prompt and response are tokenized separately, as a model meets them when it generates. A response is cut where the row
    is full; a row whose prompt leaves no room for it is left out. The prompt of a chat is all turns but the last, as the
    tokenizer's chat template writes them.

    Args:
        task: `prompts`, with the text columns `("prompt", "response")` or `("messages",)`.
        tokenizer: with an EOS or BOS token, and for chats a template.
        max_length: most tokens in a row.

    Raises:
        InputError: by the function, where the template refuses a chat.
    """
    (begin, _), end = special_ends(tokenizer), document_end(tokenizer)
    assert end is not None, "checked by check_tokenizer"

    def work(rows: Rows) -> Rows:
        if task.text_columns == CHAT:
            given = task.chat_template_kwargs
            pairs = [answered(chat, tokenizer, given, "data.path") for chat in rows["messages"]]
            prompts, responses, first = [p for p, _ in pairs], [r for _, r in pairs], []
        else:
            prompts, responses, first = rows["prompt"], rows["response"], begin
        before, after = (
            tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for texts in (prompts, responses)
        )
        ids, labels = [], []
        for prompt, response in zip(before, after, strict=True):
            prompt = [*first, *prompt] or [end]
            response = [*response, *([] if response[-1:] == [end] else [end])][: max_length - len(prompt)]
            if len(prompt) < max_length:
                ids.append([*prompt, *response])
                labels.append([*[IGNORED] * len(prompt), *response])
        return as_rows(ids, labels)

    return work
