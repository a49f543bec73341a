"""Latency of two models over batch sizes and lengths."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.measuring.clocks import in_turns, seconds
from distill_llm.measuring.counting import full_length_inputs
from distill_llm.measuring.profiling import Comparison
from distill_llm.models.limits import limits_of

REPEATS = 5
"""Timed pairs of a point, after one that is not timed."""


@dataclass(frozen=True)
class GridPoint:
    """Two models timed in turn on one batch.

    Attributes:
        batch_size: B, sequences in the batch.
        sequence_length: T, tokens in each.
        model_ms, other_ms: median time of a forward pass, in milliseconds.
        speedup: median over the pairs of (time of the other / time of the model).
    """

    batch_size: int
    sequence_length: int
    model_ms: float
    other_ms: float
    speedup: float


def latency_grid(
    model: PreTrainedModel, other: PreTrainedModel, measured: Comparison, limit: float = 30.0
) -> list[GridPoint]:
    """Time two models on smaller batches and on shorter and longer rows than they were compared on.

    No batch has more tokens than the one of the comparison, which the models are known to have memory for. The smallest comes
    first; one that would not end within `limit` seconds is left out, and so are those after it.

    Args:
        model, other: as they were given to `compare`.
        measured: what `compare` returned, which is one of the points.
        limit: seconds for all.

    Returns:
        Points in order of batch size and length.
    """
    base = measured.model
    points = [
        GridPoint(base.batch_size, base.sequence_length, base.latency_ms, measured.other.latency_ms, measured.speedup)
    ]
    tokens = base.batch_size * base.sequence_length
    token_seconds = (base.latency_ms + measured.other.latency_ms) / 1000 / tokens
    longest = min(limits_of(each.config, "model").longest or tokens for each in (model, other))
    left = limit
    for batch_size, length in shapes(base.batch_size, base.sequence_length, longest):
        left -= batch_size * length * token_seconds * (REPEATS + 1)
        if left < 0:
            break
        points.append(_timed(model, other, batch_size, length))
    return sorted(points, key=lambda point: (point.batch_size, point.sequence_length))


def shapes(batch_size: int, sequence_length: int, longest: int) -> Sequence[tuple[int, int]]:
    """Batches (B, T) beside the given one, with at most as many tokens; the one with the fewest tokens first.

    Rows: one, a quarter and all of `batch_size`. Tokens: half, one, two and four times `sequence_length`, at most `longest`.
    """
    rows = {1, max(1, batch_size // 4), batch_size}
    lengths = {
        each for each in (sequence_length // 2, *(sequence_length * n for n in (1, 2, 4))) if 0 < each <= longest
    }
    found = {(b, t) for b in rows for t in lengths if b * t <= batch_size * sequence_length}
    return sorted(found - {(batch_size, sequence_length)}, key=lambda shape: (shape[0] * shape[1], shape))


def _timed(model: PreTrainedModel, other: PreTrainedModel, batch_size: int, length: int) -> GridPoint:
    inputs = [full_length_inputs(each, batch_size, length) for each in (model, other)]

    def first() -> float:
        return seconds(lambda: model(**inputs[0]), model.device)

    def second() -> float:
        return seconds(lambda: other(**inputs[1]), other.device)

    with evaluating(model), evaluating(other):
        pairs = in_turns(first, second, REPEATS + 1)[1:]
    ours, theirs = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
    return GridPoint(batch_size, length, ours, theirs, statistics.median(b / a for a, b in pairs))
