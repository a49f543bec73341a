"""Chats in the words of a tokenizer's chat template: what a model is asked, and what it is to answer."""

from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase

from distill_llm.errors import InputError, first_line

Chat: TypeAlias = list[dict[str, Any]]


def is_chat(turns: Any) -> bool:
    """Whether a value is a list of turns, one or more, each with a role and a content that are text."""
    try:
        return bool(turns) and all(isinstance(turn[key], str) for turn in turns for key in ("role", "content"))
    except (TypeError, KeyError):
        return False


def asked(chat: Chat, tokenizer: PreTrainedTokenizerBase, field: str) -> str:
    """The turns of a chat as text, up to where the assistant's answer begins.

    Args:
        chat: turns that end with a question.
        tokenizer: with a chat template.
        field: the setting that gave the chat, for errors.

    Raises:
        InputError: the template refuses the chat.
    """
    return _in_template(chat, tokenizer, field, add_generation_prompt=True)


def answered(chat: Chat, tokenizer: PreTrainedTokenizerBase, field: str) -> tuple[str, str]:
    """Prompt and response of a chat as text; what the template puts behind the turn's EOS is left out.

    Args:
        chat: turns that end with the assistant's.
        tokenizer, field: as of `asked`.

    Raises:
        InputError: the template refuses the chat, or does more than add the answer to the prompt.
    """
    turns = [{key: value for key, value in turn.items() if value is not None} for turn in chat]
    prompt = asked(turns[:-1], tokenizer, field)
    whole = _in_template(turns, tokenizer, field)
    if not whole.startswith(prompt):
        given = f"chats in the words of {tokenizer.name_or_path}"
        raise InputError(field, given, "a chat template that only adds the answer to its prompt")
    return prompt, whole[len(prompt) :].rstrip()


def _in_template(chat: Chat, tokenizer: PreTrainedTokenizerBase, field: str, **options: Any) -> str:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, **options))
    except Exception as error:  # a template raises what it likes
        roles = ", ".join(turn["role"] for turn in chat)
        raise InputError(field, f"a chat of {roles}", f"chats that the template takes ({first_line(error)})") from None
