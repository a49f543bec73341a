"""The curve of a student with exits: its score over its measured latency, at several thresholds."""

import statistics
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.evaluation.evaluate import batches_of, by_length
from distill_llm.evaluation.exits import ExitAnswers, Score, chosen_threshold, exit_answers
from distill_llm.measuring.clocks import in_turns, seconds
from distill_llm.models.inputs import forward_inputs
from distill_llm.pipeline.context import Context

POINTS, REPEATS, MOST_BATCHES = 9, 5, 8
"""Thresholds on the curve; timed passes of each, after one that is not timed; batches in a pass."""
LIMIT = 30.0
"""Seconds for all timing together."""


def exit_record(run: Context, student: PreTrainedModel) -> dict[str, Any]:
    """What is known of a student's exits: the threshold, where it comes from, each exit's score, and the curve."""
    section, data, size = run.recipe.exits, run.data, run.recipe.evaluation.batch_size
    assert section is not None
    test = exit_answers(student, data.test, data.task, run.collator, size)
    held_out = data.validation and exit_answers(student, data.validation, data.task, run.collator, size)
    threshold: float | Literal["auto"] | None = section.threshold
    if threshold == "auto":
        assert held_out is not None  # the checks see to it
        threshold = chosen_threshold(held_out, section.within)
    assert threshold is None or isinstance(threshold, float)
    shown = _shown(held_out or test, threshold)
    times = _times(run, student, shown)
    every = [(None, 1.0, None), *((each, *time) for each, time in zip(shown, times[1:], strict=True))]
    return {
        "after": list(section.after),
        "layers": test.layers[-1],
        "threshold": threshold,
        "chosen": section.threshold == "auto",
        "within": section.within,
        "held_out": None if held_out is None else _row(held_out.at(threshold)) | {"rows": len(held_out.labels)},
        "whole_held_out": None if held_out is None else _row(held_out.at(None)),
        "exits": [_row(test.of_exit(place)) for place in range(len(section.after))],
        "batch_size": run.recipe.evaluation.latency.batch_size,
        "curve": [
            {
                "threshold": each,
                "speedup": speedup,
                "latency_ms": times[0][1] if each is None else time,
                **_row(test.at(each)),
            }
            for each, speedup, time in every
        ],
    }


def _row(score: Score) -> dict[str, Any]:
    return {**vars(score), "left": list(score.left)}


def _shown(answers: ExitAnswers, threshold: float | None) -> list[float]:
    """Thresholds for the curve, falling: candidates at even distances in layers, and the one that was chosen."""
    found = sorted(answers.candidates(), key=lambda each: answers.at(each).layers)
    layers = [answers.at(each).layers for each in found]
    aims = [layers[0] + (layers[-1] - layers[0]) * n / (POINTS - 1) for n in range(POINTS)]
    near = {min(range(len(found)), key=lambda n: abs(layers[n] - aim)) for aim in aims}
    chosen = {found[n] for n in near} | ({threshold} if threshold is not None else set())
    return sorted(chosen, reverse=True)


def _times(run: Context, student: PreTrainedModel, thresholds: Sequence[float]) -> list[tuple[float, float]]:
    """The speed-up over all layers and the milliseconds of a batch: of no threshold, then of each."""
    batches = _batches(run, student)

    def of(threshold: float | None, some: Sequence[dict[str, Any]]) -> Callable[[], float]:
        more = {} if threshold is None else {"exit_threshold": threshold}
        return lambda: seconds(lambda: [student(**batch, **more) for batch in some], student.device)

    with evaluating(student):
        of(None, batches)()
        once = of(None, batches)()
        most = int(len(batches) * LIMIT / (2 * once * (REPEATS + 1) * max(1, len(thresholds))))
        some = batches[:: -(-len(batches) // max(1, min(most, len(batches))))]
        found, whole = [], []
        for threshold in thresholds:
            pairs = in_turns(of(None, some), of(threshold, some), REPEATS + 1)[1:]
            whole += [before for before, _ in pairs]
            milliseconds = 1000 * statistics.median(after for _, after in pairs) / len(some)
            found.append((statistics.median(before / after for before, after in pairs), milliseconds))
    return [(1.0, 1000 * statistics.median(whole or [once]) / len(some)), *found]


def _batches(run: Context, student: PreTrainedModel) -> list[dict[str, torch.Tensor]]:
    """Batches of test rows, of the size that latency is measured with, evenly spread over the rows' lengths."""
    rows, size = run.data.test, run.recipe.evaluation.latency.batch_size
    whole = [by_length(rows)[at : at + size] for at in range(0, max(1, len(rows) - size + 1), size)]
    chosen = whole[:: -(-len(whole) // MOST_BATCHES)]
    found = [next(batches_of(student, rows, order, run.collator, size, progress=False)) for order in chosen]
    return [forward_inputs(student, batch) for batch in found]
