"""Times of forward passes, alone and in pairs: two models, or two parts of one, take turns on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.measuring.counting import full_length_inputs

T = TypeVar("T")
WARM_UP = 3
"""Runs that are not timed, before those that are."""

Clock = Callable[[Callable[[], Any], Callable[[], Any]], tuple[float, float]]
"""Given two calls: the seconds that the first takes, and how many times as long the second takes."""

Measure = Callable[[PreTrainedModel, PreTrainedModel], float]
"""Given two models: how many times as long a forward pass of the first takes as one of the second."""


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """How long `run` takes on a device, until all its work there is done; nothing is recorded for gradients."""
    with torch.inference_mode():
        return seconds_with_gradients(run, device)


def seconds_with_gradients(run: Callable[[], Any], device: torch.device) -> float:
    """The same for work that may have a backward pass."""
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def in_turns(first: Callable[[], T], second: Callable[[], T], repeats: int) -> list[tuple[T, T]]:
    """Call both `repeats` times and pair what they return, in this order.

    Which of the two goes first changes every time, so that a slow moment of the machine hits both alike.
    """
    pairs = []
    for repeat in range(repeats):
        if repeat % 2:
            after, before = second(), first()
        else:
            before, after = first(), second()
        pairs.append((before, after))
    return pairs


def relative_latency(
    model: PreTrainedModel, other: PreTrainedModel, batch_size: int = 32, sequence_length: int = 64
) -> float:
    """How many times as long a forward pass of `model` takes as one of `other`: the median over pairs that take turns."""
    inputs = [full_length_inputs(each, batch_size, sequence_length) for each in (model, other)]
    with evaluating(model), evaluating(other):
        return on_device(other.device)(lambda: other(**inputs[1]), lambda: model(**inputs[0]))[1]


def on_device(device: torch.device, fewest: int = 11, most: int = 101, budget: float = 0.5) -> Clock:
    """A clock for a device: after a warm-up it times between `fewest` and `most` pairs, about `budget` seconds of them."""

    def clock(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
        def time_first() -> float:
            return seconds(first, device)

        def time_second() -> float:
            return seconds(second, device)

        once = sum(in_turns(time_first, time_second, WARM_UP)[-1])
        times = in_turns(time_first, time_second, min(most, max(fewest, int(budget / once))))
        return statistics.median(a for a, _ in times), statistics.median(b / a for a, b in times)

    return clock


def _wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
