"""How scales are learnt (see `learn_scales`). Needs no torch."""

from dataclasses import dataclass

from distill_llm.common.errors import InputError


@dataclass(frozen=True)
class Scaling:
    """How factors are learnt.

    Attributes:
        steps: of Adam, one batch of rows each.
        learning_rate: of the first step; it falls in a straight line to 0.

    Raises:
        InputError: fewer steps than one, or a rate that is not above 0.
    """

    steps: int = 200
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise InputError("steps", self.steps, "at least 1")
        if not 0 < self.learning_rate < float("inf"):
            raise InputError("learning_rate", self.learning_rate, "a number above 0")


DEFAULT_SCALING = Scaling()
