"""Metrics of the library `evaluate` that compare texts: modules, found by Hub id or by the path of a script."""

from collections.abc import Sequence
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from distill_llm.common.errors import InputError, first_line, one_of
from distill_llm.metrics.registry import METRICS, metrics_of

if TYPE_CHECKING:
    from evaluate import EvaluationModule

PERPLEXITY = "perplexity"
"""The score of prompts where nothing is generated: it is made from the model's loss, so it is no function of texts."""


@cache
def _module_of(name: str) -> "EvaluationModule":
    import evaluate

    return evaluate.load(name, keep_in_memory=True)


def text_score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """One number that compares texts: by a metric of METRICS, or by a module of `evaluate`.

    Args:
        metric: a metric of texts in METRICS; else NAME or NAME:VALUE of a module, NAME being its Hub id or the path of its
            script, VALUE one of the values that it returns (`rouge:rougeL`). Without VALUE, the value that has the
            module's name counts, or the only one.
        predictions, references: (rows,) texts.

    Raises:
        InputError: naming `evaluation.metric`: there is no such module or value, or it does not work on texts.
    """
    if metric in metrics_of(["texts"]):
        return METRICS[metric](predictions, references)
    name, _, wanted = metric.partition(":")
    try:
        found = _module_of(name).compute(predictions=list(predictions), references=list(references))
    except Exception as error:  # a module raises what it likes: a missing package, other inputs, no such module
        _module_of.cache_clear()  # a module that failed keeps the rows it was given
        known = one_of((PERPLEXITY, *metrics_of(["texts"])), metric)
        accepted = f"{known}, or a metric of evaluate for texts ({first_line(error)})"
        raise InputError("evaluation.metric", metric, accepted) from None
    own = Path(name).stem
    values = found if isinstance(found, dict) else {own: found}
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, Real)}
    wanted = wanted or (next(iter(numbers)) if len(numbers) == 1 else own)
    if wanted not in numbers:
        raise InputError("evaluation.metric", metric, one_of([f"{name}:{key}" for key in numbers], metric))
    return numbers[wanted]


def prefers_higher(metric: str) -> bool:
    """Whether more is better by a metric of texts.

    A module does not say: it is tried on equal texts and on texts that share no word.

    Raises:
        InputError: as `text_score`; or the module gives both the same number.
    """
    if metric in metrics_of(["texts"]):
        return METRICS[metric].higher_is_better
    texts, others = (
        ["the cat sat on the mat", "rain fell all night"],
        ["a dog ran off with him", "nobody else came here"],
    )
    equal, different = text_score(metric, texts, texts), text_score(metric, others, texts)
    if not (equal > different or equal < different):
        accepted = "a metric that gives equal texts another value than different texts"
        raise InputError("evaluation.metric", metric, accepted)
    return equal > different
