"""Prompts to be answered: read from files, a Hub data set or lists, checked, and encoded as training will encode them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset, Value
from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, as_arguments, one_of
from distill_llm.data.chats import Chat, as_turn, asked, is_chat
from distill_llm.data.files import FileFormat
from distill_llm.data.sources import read_splits, resolve_path
from distill_llm.data.special_tokens import special_ends

Source: TypeAlias = str | Dataset | Sequence[str] | Sequence[Chat]
CHUNK = 1000  # prompts tokenized at once


@dataclass(frozen=True)
class Prompt:
    """A prompt as text or as the turns of a chat, as (T,) token ids, a hash of its content, and the first row that has it."""

    content: str | Chat
    ids: list[int]
    key: bytes
    row: int = 0

    def answered(self, response: str) -> dict[str, Any]:
        """A row of the task `prompts`: `prompt` and `response`, or `messages` that end with the response."""
        if isinstance(self.content, str):
            return {"prompt": self.content, "response": response}
        return {"messages": [*self.content, as_turn("assistant", response)]}

    @property
    def continued(self) -> list[int]:
        """The tokens that an answer continues as text: none of a chat, where an answer is a turn of its own."""
        return self.ids if isinstance(self.content, str) else []

    def is_asked_in(self, row: Mapping[str, Any]) -> bool:
        """Whether a row is an answer to this prompt."""
        return self.content == (row.get("prompt") if isinstance(self.content, str) else row.get("messages", [])[:-1])


def read_contents(
    source: Source,
    column: str | None,
    limit: int | None,
    form: FileFormat = FileFormat(),  # noqa: B008 - frozen
) -> list[str] | list[Chat]:
    """The prompts in the order of the rows, repeated ones too: all texts, or all chats.

    Args:
        source: what `read_splits` takes (its train split is answered), a data set, texts, or chats.
        column: with texts or with chats; by default `prompt`, else `messages`.
        limit: only the first rows.
        form: how files are written.

    Raises:
        InputError: naming `data`, `separator`, `encoding` or `prompt_column`: nothing to read, no such column, other values
            than texts or chats, an empty prompt.
    """
    rows = _rows(source, form)
    if limit is not None:
        rows = rows.select(range(min(limit, len(rows))))
    name = column or ("messages" if {"prompt", "messages"} & {*rows.column_names} == {"messages"} else "prompt")
    if name not in rows.column_names:
        raise InputError("prompt_column", name, one_of(rows.column_names, name))
    if not len(rows):
        raise InputError("data", "no rows", "at least one prompt")
    feature = rows.features[name]
    if isinstance(feature, Value) and feature.dtype in ("string", "large_string"):
        texts = list(rows[name])
        for place, text in enumerate(texts):
            if text is None or not text.strip():
                raise InputError("data", f"an empty prompt in row {place} of {name!r}", "a text in every row")
        return texts
    return [_without_answer(chat, place, name) for place, chat in enumerate(rows[name])]


def _rows(source: Source, form: FileFormat) -> Dataset:
    if isinstance(source, Dataset):
        return source
    if isinstance(source, str):
        try:
            return read_splits(resolve_path(source, "data.path"), form=form)["train"]
        except InputError as error:
            fault = as_arguments(error, ("data",))
            raise fault.renamed("data" if fault.field == "path" else fault.field) from error
    texts = all(isinstance(each, str) for each in source)
    return Dataset.from_dict({"prompt" if texts else "messages": list(source)})


def _without_answer(chat: Any, place: int, column: str) -> Chat:
    """The turns of a chat that ask, in plain dictionaries; a last turn of the assistant is left out."""
    accepted = "a column of texts, or of chats: lists of turns with role and content, at least one before the answer"
    try:
        turns = [{name: value for name, value in turn.items() if value is not None} for turn in chat]
        question = turns[:-1] if turns[-1]["role"] == "assistant" else turns
    except (TypeError, KeyError, IndexError, AttributeError):
        question = []
    if not is_chat(question):
        raise InputError("prompt_column", f"{column} (row {place})", accepted)
    if not question[-1]["content"].strip():
        raise InputError("data", f"an empty prompt in row {place} of {column!r}", "a text in every row")
    return question


def encode_prompts(
    contents: Sequence[str] | Sequence[Chat],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """The different prompts among `contents`, in the order of their first occurrence.

    Token ids are those of `distill_llm.data.prompt_encoder.PromptEncoder`: a text begins as the tokenizer begins texts, a chat is
    in the words of the chat template up to where the assistant's turn begins.

    Args:
        contents: of `read_contents`.
        tokenizer: with a chat template where there are chats.
        chat: make each text the user's turn of a chat.
        chat_template_kwargs: what the template is given beside the chats.

    Raises:
        InputError: the template refuses a chat; a prompt has no tokens.
    """
    given = chat_template_kwargs or {}
    chats = [[as_turn("user", each)] if chat and isinstance(each, str) else each for each in contents]
    first: dict[bytes, int] = {}
    for row, each in enumerate(chats):
        first.setdefault(_key(each), row)
    keys, rows = list(first), list(first.values())
    kept = [chats[row] for row in rows]
    begin = special_ends(tokenizer)[0]
    prompts: list[Prompt] = []
    for start in range(0, len(kept), CHUNK):
        some = kept[start : start + CHUNK]
        texts = [each if isinstance(each, str) else asked(each, tokenizer, given, "data") for each in some]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for place, (content, ids) in enumerate(zip(some, encoded, strict=True), start):
            ids = [*(begin if isinstance(content, str) else []), *ids]
            if not ids:
                raise InputError("data", content, "a prompt with at least one token that the tokenizer knows")
            prompts.append(Prompt(content, ids, keys[place], rows[place]))
    return prompts


def _key(content: str | Chat) -> bytes:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).digest()
