"""Access tokens: recognised by their form, and kept out of everything that is printed, saved or uploaded."""

import re

_TOKEN = re.compile(r"\bhf_(?:[a-z]+_)?[A-Za-z0-9]{20,}[\w.~+/=-]*|(?<=\bBearer )[^\s'\"]+")
"""Tokens of the Hub, and what a request sends as one."""


def hidden(text: str, *tokens: str | None) -> str:
    """A text without what looks like a token, and without these tokens, whatever they look like."""
    for token in filter(None, tokens):
        text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", text)


def holds_token(text: str, *tokens: str | None) -> bool:
    """Whether a text holds what looks like a token, or one of these."""
    return bool(_TOKEN.search(text)) or any(token in text for token in filter(None, tokens))
