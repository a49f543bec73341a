"""How rows are changed, as one object from the recipe to the place that changes them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Replace:
    """Words replaced by likely ones; `share`: of the words of a row. See `distill_llm.models.candidates`."""

    share: float = 0.4


@dataclass(frozen=True)
class Spans:
    """Runs of `length` words or tokens, which together are about this share of a row; at least one run."""

    share: float = 0.1
    length: int = 1


@dataclass(frozen=True)
class Mixup:
    """Examples mixed with others; their shares are drawn from Beta(alpha, alpha)."""

    alpha: float = 0.4


@dataclass(frozen=True)
class Augment:
    """What is done to rows, in the order of the fields; None: not done.

    Attributes:
        share: of the rows, that are changed in an epoch; the others stay as they are.
        keep_labels: whether changed rows keep the labels of the data, mixed where examples are; else they have none.
        replace: words replaced.
        backoff: runs of words replaced by words drawn from those of all rows.
        cutout: runs of tokens that no model may look at.
        mixup: examples mixed.
    """

    share: float = 0.5
    keep_labels: bool = True
    replace: Replace | None = None
    backoff: Spans | None = None
    cutout: Spans | None = None
    mixup: Mixup | None = None
