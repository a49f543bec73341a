"""Metrics of texts that a model generated."""

import re
from collections.abc import Sequence
from decimal import Decimal

from distill_llm.metrics.registry import metric

MARK = "####"
NUMBER = re.compile(r"((?<![\w.)])-)?\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


@metric("texts", is_share=True)
def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the texts that equal their reference; white space at the ends does not count."""
    equal = [one.strip() == other.strip() for one, other in zip(predictions, references, strict=True)]
    return sum(equal) / len(equal)


@metric("texts", is_share=True)
def final_answer(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Share of the texts that end with the answer of their reference (as in GSM8K: Cobbe et al., 2021).

    The steps that lead to an answer do not count.
    """
    equal = [answer_of(one) == answer_of(other) for one, other in zip(predictions, references, strict=True)]
    return sum(equal) / len(equal)


def answer_of(text: str) -> Decimal | str:
    """The answer that a text ends with.

    After the last `####`, it is the first number on that line; without that mark, it is the last number of the text. 1,000,
    $1000 and 1000.0 are the same number. Where there is no number, the answer is the text itself (or the line after the
    mark) in small letters, without spaces or full stops at its ends.
    """
    _, mark, marked = text.rpartition(MARK)
    lines = marked.strip().splitlines() if mark else [text]
    line = lines[0] if lines else ""
    found = NUMBER.findall(line)
    if not found:
        return line.strip(" \t\r\n.").lower()
    sign, digits = found[0 if mark else -1]
    return Decimal(sign + digits.replace(",", ""))
