"""Times taken in pairs: two models, or two parts of one, take turns on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.measuring.counting import full_length_inputs

Clock = Callable[[Callable[[], Any], Callable[[], Any]], tuple[float, float]]
"""Of two things to run: the seconds that the first takes, and how many times as long the second takes."""


Measure = Callable[[PreTrainedModel, PreTrainedModel], float]
"""How many times as long the first model's forward pass takes as the second's."""


def relative_latency(
    model: PreTrainedModel, other: PreTrainedModel, batch_size: int = 32, sequence_length: int = 64
) -> float:
    """How many times as long a forward pass of `model` takes as one of `other`: the median over pairs that take turns."""
    inputs = [full_length_inputs(each, batch_size, sequence_length) for each in (model, other)]
    with evaluating(model), evaluating(other):
        return on_device(other.device)(lambda: other(**inputs[1]), lambda: model(**inputs[0]))[1]


def on_device(device: torch.device, fewest: int = 11, most: int = 101, seconds: float = 0.5) -> Clock:
    """A clock for things that run on a device: between `fewest` and `most` pairs, about `seconds` of them, after a warm-up.

    The two take turns, and which goes first changes every time, so that a slow moment of the machine hits both.
    """

    def run(call: Callable[[], Any]) -> float:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        return time.perf_counter() - start

    def clock(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float]:
        with torch.inference_mode():
            for _ in range(3):
                once = run(first) + run(second)
            times = []
            for repeat in range(min(most, max(fewest, int(seconds / once)))):
                times.append((run(first), run(second)) if repeat % 2 else (run(second), run(first))[::-1])
        return statistics.median(a for a, _ in times), statistics.median(b / a for a, b in times)

    return clock


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
