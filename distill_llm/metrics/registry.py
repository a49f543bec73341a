"""The table of metrics: a decorated function is one of them."""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from distill_llm.common.errors import InputError, one_of

Inputs = Literal["classes", "values", "texts"]
Function = Callable[..., float]


@dataclass(frozen=True)
class Metric:
    """A number that says how well predictions fit their references.

    Attributes:
        name: what recipes and metrics.json call it.
        inputs: what it compares: ids of `classes`, real `values` or `texts`.
        higher_is_better: whether a larger number is a better one.
        function: from predictions and references, sequences of one length, to a number.
        is_share: whether it is the share of the items that are right, which has a standard error by formula.
        of_truth: whether references are the data's; otherwise a user cannot choose it for data.
    """

    name: str
    inputs: Inputs
    higher_is_better: bool
    function: Function
    is_share: bool = False
    of_truth: bool = True

    def __call__(self, predictions: Any, references: Any, num_labels: int = 1) -> float:
        """The metric of predictions (items,) against references (items,).

        Args:
            num_labels: how many classes there are; passed on to a function that has a parameter of this name.

        Raises:
            InputError: the function did not return one finite number.
        """
        wanted = "num_labels" in inspect.signature(self.function).parameters
        found = self.function(predictions, references, **({"num_labels": num_labels} if wanted else {}))
        try:
            number = float(found)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            given = found if isinstance(found, float) else f"a {type(found).__name__}"
            raise InputError("metric", self.name, fix=f"return one finite number: it returned {given}")
        return number


METRICS: dict[str, Metric] = {}
"""All metrics by name, in the order in which messages list them."""


def metric(
    inputs: Inputs, *, higher_is_better: bool = True, is_share: bool = False, of_truth: bool = True
) -> Callable[[Function], Function]:
    """Decorator: makes a function of predictions and references a metric of the function's name.

    Args:
        inputs, higher_is_better, is_share, of_truth: see `Metric`.

    Raises:
        InputError: no such inputs, or a name that is taken.
    """
    if inputs not in get_args(Inputs):
        raise InputError("inputs", inputs, one_of(get_args(Inputs), str(inputs)))

    def register(function: Function) -> Function:
        name = function.__name__
        if name in METRICS:
            raise InputError("metric", name, fix="choose another name: there is a metric of this name")
        METRICS[name] = Metric(name, inputs, higher_is_better, function, is_share, of_truth)
        return function

    return register


def find_metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        InputError: there is none.
    """
    if name not in METRICS:
        raise InputError("metric", name, one_of(METRICS, name))
    return METRICS[name]


def metrics_of(inputs: Iterable[Inputs]) -> list[str]:
    """Names of the metrics of data that compare these."""
    wanted = set(inputs)
    return [name for name, each in METRICS.items() if each.inputs in wanted and each.of_truth]
