"""Chats as text, written by a tokenizer's chat template: what a model is asked, and what it should answer."""

import inspect
import json
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, first_line
from distill_llm.data.padding import Rows

Chat: TypeAlias = list[dict[str, Any]]
# What `apply_chat_template` takes for itself, or is given here.
_TAKEN = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"} - {
    "tools",
    "documents",
}


def is_chat(turns: Any) -> bool:
    """Whether a value is a list of turns, one or more, each with a role and a content that are text."""
    try:
        return bool(turns) and all(isinstance(turn[key], str) for turn in turns for key in ("role", "content"))
    except (TypeError, KeyError):
        return False


def as_turn(role: str, content: str) -> dict[str, str]:
    """A turn of a chat."""
    return {"role": role, "content": content}


def as_chats(rows: Rows) -> Rows:
    """Columns `prompt` and `response` as a column `messages`: the user's turn, and the assistant's."""
    pairs = zip(rows["prompt"], rows["response"], strict=True)
    return {"messages": [[as_turn("user", prompt), as_turn("assistant", response)] for prompt, response in pairs]}


def template_faults(kwargs: Mapping[str, Any] | None, are_chats: bool, field: str) -> list[InputError]:
    """A fault where a chat template is given something and there are no chats to put in its words."""
    if not kwargs or are_chats:
        return []
    fix = "leave it out, or set `chat`, which turns prompts into chats: these data are not chats"
    return [InputError(field, dict(kwargs), fix=fix)]


def check_template_kwargs(kwargs: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, field: str) -> None:
    """Check that a chat template reads every name that it is given; it would silently ignore any other.

    Args:
        kwargs: for `apply_chat_template`.
        tokenizer: with a chat template.
        field: the setting that gave them, for errors.

    Raises:
        InputError: a name that is not in the template, or has its value already; a value that is not plain JSON.
    """
    words = {*re.findall(r"[^\W\d]\w*", str(tokenizer.get_chat_template()))} - _TAKEN if kwargs else set()
    for name in kwargs:
        if name not in words:
            near = get_close_matches(name, sorted(words), n=1)
            accepted = f"names that the chat template reads{f', such as {near[0]!r} (the nearest)' if near else ''}"
            raise InputError(field, name, accepted)
    try:
        json.dumps(kwargs)
    except TypeError:
        raise InputError(field, dict(kwargs), "text, numbers, lists and mappings (put a date in quotes)") from None


def asked(chat: Chat, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], field: str) -> str:
    """The turns of a chat as text, up to where the assistant's answer begins.

    Args:
        chat: turns that end with a question.
        tokenizer: with a chat template.
        kwargs: further variables of the template.
        field: the setting that gave the chat, for errors.

    Raises:
        InputError: the template refuses the chat.
    """
    return _in_template(chat, tokenizer, {**kwargs, "add_generation_prompt": True}, field)


def answered(chat: Chat, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], field: str) -> tuple[str, str]:
    """Prompt and response of a chat as text, without what the template adds after the EOS of the answer.

    Args:
        chat: turns that end with the assistant's.
        tokenizer, kwargs, field: as of `asked`.

    Raises:
        InputError: the template refuses the chat, or does more than add the answer to the prompt.
    """
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in chat]
    prompt = asked(turns[:-1], tokenizer, kwargs, field)
    whole = _in_template(turns, tokenizer, kwargs, field)
    if not whole.startswith(prompt):
        given = f"chats in the words of {tokenizer.name_or_path}"
        raise InputError(field, given, "a chat template that leaves the prompt unchanged when an answer follows")
    return prompt, whole[len(prompt) :].rstrip()


def _in_template(chat: Chat, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], field: str) -> str:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **kwargs))
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(turn["role"] for turn in chat)
        raise InputError(field, f"a chat of {roles}", f"chats that the template takes ({first_line(error)})") from None
