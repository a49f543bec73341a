"""The list `calibration` of the pruning section: where calibration rows come from, if not from the training rows alone."""

from pydantic import Field

from distill_llm.recipe.columns import ColumnsSection
from distill_llm.recipe.section import Section

HELD_OUT = 5
"""Of so many calibration batches one is held out."""


class CalibrationSection(Section):
    """A source of calibration rows. They are read as the rows of the data section are."""

    path: str | None = Field(
        default=None, description="folder, file or Hub id with rows of the same task; left out: the training rows"
    )
    share: float = Field(
        default=1.0, gt=0, description="its part of the calibration rows, in proportion to the shares of the others"
    )
    columns: ColumnsSection | None = Field(
        default=None, description="column names of these rows; left out: as in the data section"
    )


def with_held_out(examples: int) -> int:
    """How many rows a cut gets, so that statistics are of so many."""
    return examples * HELD_OUT // (HELD_OUT - 1)


def counts_of(shares: list[float], rows: int) -> list[int]:
    """How many of so many rows each source gives: in proportion to its share, whole rows by largest remainder."""
    exact = [rows * share / sum(shares) for share in shares]
    counts = [int(each) for each in exact]
    order = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in order[: rows - sum(counts)]:
        counts[i] += 1
    return counts
