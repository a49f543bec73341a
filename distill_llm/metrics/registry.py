"""Metric modules of `evaluate`: own ones, one a file, loaded by path, nothing is fetched; and any other that judges texts."""

from collections.abc import Sequence
from functools import cache
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING

from distill_llm.common.errors import InputError, first_line, one_of

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = ("accuracy", "f1", "matthews_correlation", "pearsonr", "spearmanr", "exact_match", "final_answer")
PROMPT_METRICS = ("perplexity", "exact_match", "final_answer")


@cache
def load_metric(name: str) -> "EvaluationModule":
    """One of `METRICS` as an `evaluate` module; its `compute(predictions=..., references=...)` works in memory.

    Raises:
        InputError: no such metric.
    """
    import evaluate

    if name not in METRICS:
        raise InputError("metric", name, one_of(METRICS, name))
    return evaluate.load(str(Path(__file__).with_name(f"{name}.py")), keep_in_memory=True)


@cache
def _module_of(name: str) -> "EvaluationModule":
    import evaluate

    return evaluate.load(name, keep_in_memory=True)


def text_score(metric: str, predictions: Sequence[str], references: Sequence[str]) -> float:
    """One number of any metric of `evaluate` that compares texts.

    Args:
        metric: NAME, or NAME:VALUE for one of the values that it has (`rouge:rougeL`): by default the one of its own name,
            or the only one. NAME is an id on the Hub or the path of a script.
        predictions, references: (rows,) texts.

    Raises:
        InputError: naming `evaluation.metric`: there is no such module or value, or it does not work on texts.
    """
    name, _, wanted = metric.partition(":")
    try:
        found = _module_of(name).compute(predictions=list(predictions), references=list(references))
    except Exception as error:  # what it is made of is not ours: a missing package, other inputs, no such module
        _module_of.cache_clear()  # one that failed keeps the rows
        accepted = f"{one_of(PROMPT_METRICS, metric)}, or a metric of evaluate for texts ({first_line(error)})"
        raise InputError("evaluation.metric", metric, accepted) from None
    own = Path(name).stem
    values = found if isinstance(found, dict) else {own: found}
    numbers = {key: float(value) for key, value in values.items() if isinstance(value, Real)}
    wanted = wanted or (next(iter(numbers)) if len(numbers) == 1 else own)
    if wanted not in numbers:
        raise InputError("evaluation.metric", metric, one_of([f"{name}:{key}" for key in numbers], metric))
    return numbers[wanted]


def prefers_higher(metric: str) -> bool:
    """Whether more is better by a metric of `text_score`: tried on texts that are equal and on texts that share no word.

    Raises:
        InputError: as `text_score`; or the metric does not tell the two apart.
    """
    texts, others = (
        ["the cat sat on the mat", "rain fell all night"],
        ["a dog ran off with him", "nobody else came here"],
    )
    equal, different = text_score(metric, texts, texts), text_score(metric, others, texts)
    if not (equal > different or equal < different):
        accepted = "a metric that tells equal texts from others"
        raise InputError("evaluation.metric", metric, accepted)
    return equal > different
