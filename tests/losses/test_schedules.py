"""Schedules of weights and temperatures."""

import math

import pytest

from distill_llm.losses import parse_objective
from distill_llm.losses.schedules import Schedule, value_at


def test_a_line_reaches_the_end_after_its_share_of_the_steps_and_stays_there():
    schedule = Schedule(start=4, end=1, share=0.6)
    assert [schedule.at(step, 10) for step in range(10)] == pytest.approx([4, 3.5, 3, 2.5, 2, 1.5, 1, 1, 1, 1])


def test_steps_count_whatever_the_length_of_training():
    schedule = Schedule(start=0, end=8, steps=4)
    assert [schedule.at(step, total) for step, total in ((0, 5), (1, 5), (3, 100), (4, 100), (9, 3))] == [0, 2, 6, 8, 8]


def test_cosine_is_half_a_wave_and_constant_a_jump():
    cosine = Schedule(start=2, end=0, schedule="cosine")
    assert [cosine.at(step, 4) for step in range(5)] == pytest.approx([1 + math.cos(math.pi * i / 4) for i in range(5)])
    jump = Schedule(start=0, end=1, schedule="constant", share=0.5)
    assert [jump.at(step, 4) for step in range(4)] == [0, 0, 1, 1]


def test_a_number_is_itself_and_the_whole_of_training_is_the_default_length():
    assert value_at(0.5, 3, 10) == 0.5
    assert value_at(Schedule(start=1, end=0), 9, 10) == pytest.approx(0.1)
    assert value_at(Schedule(start=1, end=0), 0, 10) == value_at(Schedule(start=1, end=0), 0, 0) == 1


def test_weights_of_all_terms_are_those_of_the_step():
    objective = parse_objective({"labels": {"weight": {"start": 0, "end": 1}}, "hidden": {"weight": 3}})
    assert objective.weights(1, 4) == {"labels": 0.25, "hidden": 3.0}
