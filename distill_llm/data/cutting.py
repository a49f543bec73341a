"""Long texts cut before they are tokenized: of a field of 50 MB only the first few thousand characters can count."""

from transformers import PreTrainedTokenizerBase

CHARACTERS = 16
"""Characters for each token that a row may have, in the first try; then eight times as many."""
SPARE = 8
"""Tokens that the part must have beyond those that are used: near its cut they may be others."""


def cut_text(text: str, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    """A part of a text whose tokens, cut to `max_length`, are those of the whole text; the text itself where it is short.

    The part ends at white space where there is some, as words are tokenized alone. It is the end of the text where the
    tokenizer cuts on the left. Of a pair of two long texts each may be cut so: they share the row as before, but an odd token
    may go to the other text.

    Args:
        max_length: most tokens that are used.
    """
    size, left = CHARACTERS * (max_length + SPARE), tokenizer.truncation_side == "left"
    while len(text) > size:
        part = _end(text, size) if left else _begin(text, size)
        if len(tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]) >= max_length + SPARE:
            return part
        size *= 8
    return text


def _begin(text: str, size: int) -> str:
    """The first characters up to the last white space among them, which is left out."""
    part = text[:size]
    words = part.rstrip() if text[size].isspace() else part.rsplit(None, 1)[0] if len(part.split(None, 1)) > 1 else part
    return words or part


def _end(text: str, size: int) -> str:
    """The last characters from the first white space on."""
    part = text[-size:]
    place = next((place for place, letter in enumerate(part) if letter.isspace()), 0)
    return part[place:]
