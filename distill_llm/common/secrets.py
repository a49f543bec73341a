"""Access tokens: recognised by their form, and kept out of everything that is printed, saved or uploaded."""

import re

_TOKEN = re.compile(r"\bhf_(?:[a-z]+_)?(?=[a-z0-9]*[A-Z])(?=[A-Z0-9]*[a-z])[A-Za-z0-9]{20,}[\w.~+/=-]*")
"""Tokens of the Hub: many letters, large and small ones. A word or a row of x that begins with hf_ is none."""
_SENT = re.compile(r"(?<=\bBearer )[^\s'\"]+")
"""What a request sends as a token. A text may well have this of another kind: `Bearer $HF_TOKEN`."""


def hidden(text: str, *tokens: str | None) -> str:
    """A text without what looks like a token, and without these tokens, whatever they look like."""
    for token in filter(None, tokens):
        text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", _SENT.sub("<token>", text))


def holds_token(text: str, *tokens: str | None) -> bool:
    """Whether a text holds what looks like a token, or one of these."""
    return bool(_TOKEN.search(text)) or any(token in text for token in filter(None, tokens))
