"""Latency over batch size and length."""

from dataclasses import replace

from builders.models import tiny_model

from distill_llm.measuring.grid import GridPoint, latency_grid, shapes
from distill_llm.measuring.profiling import compare


def test_no_batch_has_more_tokens_than_the_one_that_is_known_to_fit() -> None:
    assert shapes(32, 64, 512) == [
        (1, 32), (1, 64), (1, 128), (1, 256), (8, 32), (8, 64), (8, 128), (32, 32), (8, 256)
    ]  # fmt: skip
    assert shapes(32, 64, 100) == [(1, 32), (1, 64), (8, 32), (8, 64), (32, 32)]
    assert shapes(1, 1, 512) == []


def test_the_grid_has_the_measured_point_and_stops_at_its_limit() -> None:
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    measured = compare(model, other, 4, 8, repeats=2)
    grid = latency_grid(model, other, measured)
    base = GridPoint(4, 8, measured.model.latency_ms, measured.other.latency_ms, measured.speedup)
    assert base in grid and len(grid) == len(shapes(4, 8, 512)) + 1
    assert grid == sorted(grid, key=lambda point: (point.batch_size, point.sequence_length))
    assert all(point.model_ms > 0 and point.other_ms > 0 and point.speedup > 0 for point in grid)
    slow = replace(measured, model=replace(measured.model, latency_ms=1e9))
    assert len(latency_grid(model, other, slow)) == 1
