"""Match of final answers, as a metric module of `evaluate`."""

import re
from decimal import Decimal
from typing import Any

import datasets
import evaluate

DESCRIPTION = "Share of the texts whose final answer is that of their reference, whatever leads to it."
CITATION = "Cobbe et al., Training Verifiers to Solve Math Word Problems, 2021 (the answers of GSM8K)"
INPUTS = """
Args:
    predictions: texts, one per example.
    references: texts, as many.
Returns:
    final_answer: between 0 and 1.
"""
MARK = "####"
NUMBER = re.compile(r"((?<![\w.)])-)?\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


def final_answer(text: str) -> Decimal | str:
    """The answer that a text ends with: on the line of its last ####, where it has one.

    That is the first number behind the mark, without one the last number of the text; 1,000, $1000 and 1000.0 are one
    number. Where there is no number it is the text itself, in small letters, without space or full stop at its ends.
    """
    _, mark, marked = text.rpartition(MARK)
    lines = marked.strip().splitlines() if mark else [text]
    line = lines[0] if lines else ""
    found = NUMBER.findall(line)
    if not found:
        return line.strip(" \t\r\n.").lower()
    sign, digits = found[0 if mark else -1]
    return Decimal(sign + digits.replace(",", ""))


class FinalAnswer(evaluate.Metric):
    """Share of the texts whose final answer is that of their reference, whatever leads to it."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")})
        return evaluate.MetricInfo(
            description=DESCRIPTION, citation=CITATION, inputs_description=INPUTS, features=features
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        pairs = zip(predictions, references, strict=True)
        equal = [final_answer(one) == final_answer(other) for one, other in pairs]
        return {"final_answer": sum(equal) / len(equal)}
