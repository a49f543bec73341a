"""Chats as text, written by a tokenizer's chat template: what a model is asked, and what it should answer."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

from distill_llm.common.errors import InputError, first_line
from distill_llm.data.padding import Rows

Chat: TypeAlias = list[dict[str, Any]]
MARK = "\ue000"
"""A character for private use, which no text and no template has."""
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Where a turn may have what the assistant thought before it answered."""
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
        TemplateRefusal: the template refuses the chat.
    """
    return in_template(chat, tokenizer, {**kwargs, "add_generation_prompt": True}, field)


class TemplateRefusal(InputError):
    """A chat that a template refuses; `reason`: in the words of the template."""

    def __init__(self, field: str, chat: Chat, error: Exception):
        self.reason = first_line(error)
        roles = ", ".join(turn["role"] for turn in chat)
        super().__init__(field, f"a chat of {roles}", f"chats that the template takes ({self.reason})")


class Answer(NamedTuple):
    """The last turn of a chat as text: the prompt before it; what it says; the template's words after it, up to and with its end.

    `fault`: why it cannot be learnt, if so: `dropped` and the first part of the turn that the template did not write, or
    `changed` and the turn behind which the template writes another prompt.
    """

    prompt: str
    said: str
    closing: str
    fault: tuple[str, str] | None = None


def answered(chat: Chat, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], field: str) -> Answer:
    """Prompt and answer of a chat as text.

    White space that the template adds behind the end of the answer is left out; that of the answer itself stays, unless the
    template strips it.

    Args:
        chat: turns that end with the assistant's.
        tokenizer, kwargs, field: as of `asked`.

    Raises:
        TemplateRefusal: the template refuses the chat.
    """
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in chat]
    prompt = asked(turns[:-1], tokenizer, kwargs, field)
    whole = in_template(turns, tokenizer, kwargs, field)
    if not whole.startswith(prompt):
        return Answer(prompt, "", "", ("changed", turns[-1]["content"]))
    # With another content at its place, what follows it is the template's own.
    marked = in_template([*turns[:-1], {**turns[-1], "content": MARK}], tokenizer, kwargs, field)
    closing = marked.rpartition(MARK)[2]
    if MARK not in marked or not whole.endswith(closing):
        closing = ""
    said = whole[len(prompt) : len(whole) - len(closing)]
    dropped = _dropped(turns[-1], prompt, said, closing)
    return Answer(prompt, said, closing.rstrip(), None if dropped is None else ("dropped", dropped))


def _dropped(turn: Mapping[str, Any], prompt: str, said: str, closing: str) -> str | None:
    """The first part of a turn that is not in the text of the chat, white space aside.

    Thoughts and calls must stand beside the content, which may well name them too. The content may begin within the prompt:
    a template may open the thoughts of an answer there.
    """
    content, answer = _bare(turn["content"]), _bare(said)
    if not _bare(prompt + said).endswith(content):
        return str(turn["content"])
    beside = f"{answer[: max(0, len(answer) - len(content))]} {_bare(closing)}"
    parts = [turn[name] for name in THOUGHTS if isinstance(turn.get(name), str)] + [*_texts(turn.get("tool_calls"))]
    return next((part for part in parts if not _is_in(beside, part)), None)


def _is_in(bare: str, part: str) -> bool:
    """Whether a text without white space has a part, white space aside, as it is or as JSON writes it."""
    forms = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
    return any(_bare(form) in bare for form in forms)


def _bare(text: str) -> str:
    """A text without white space."""
    return "".join(text.split())


def _texts(calls: Any) -> Iterator[str]:
    """The names and arguments in the tool calls of a turn, as far as they are text."""
    if isinstance(calls, str):
        yield calls
    elif isinstance(calls, Mapping):
        for name, value in calls.items():
            if name not in ("id", "type"):
                yield from _texts(value)
    elif isinstance(calls, list | tuple):
        for call in calls:
            yield from _texts(call)


def in_template(chat: Chat, tokenizer: PreTrainedTokenizerBase, kwargs: Mapping[str, Any], field: str) -> str:
    """A chat as the text that its template makes; raises TemplateRefusal, naming the field."""
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **kwargs))
    except Exception as error:  # a template raises what it likes
        raise TemplateRefusal(field, chat, error) from None
