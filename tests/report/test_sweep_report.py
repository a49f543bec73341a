"""The report of a sweep: its table, its curves and its page, of cells that are done, failed, or still to do."""

import json
import re

import pytest
from builders.reports import cell_metrics

from distill_llm.report.curves import draw_curve, sweep_notes, tiles
from distill_llm.report.sweep import record_of, write_sweep


@pytest.fixture
def record():
    return record_of(
        [
            (f"keep-{keep}_criterion-{name}", {"pruning.keep": keep, "pruning.criterion": name}, found, error)
            for keep, name, found, error in (
                (0.75, "fisher", cell_metrics(0.795, 3e6, 70), None),
                (0.5, "fisher", cell_metrics(0.792, 2e6, 50), None),
                (0.25, "fisher", cell_metrics(0.7, 1e6, 25), None),
                (0.5, "<b>", cell_metrics(0.6, 2e6, 60), None),
                (0.1, "fisher", None, "losses.logits is nan"),
                (0.05, "fisher", None, None),
            )
        ]
    )


def test_the_page_has_every_curve_and_needs_no_network(record, tmp_path):
    write_sweep(tmp_path, record)
    assert json.loads((tmp_path / "sweep.json").read_text()) == json.loads(json.dumps(record))
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("<svg") == 3  # memory was not measured
    assert not re.search(
        r"(src|href)=|url\(|<script|@import", page.replace('xlink:href="#', "").replace("url(#", "")
    ), page
    assert "<b>" not in page and "losses.logits is nan" in page
    rows = [
        [part.strip() for part in line.split("|")[1:-1]]
        for line in (tmp_path / "sweep.md").read_text().splitlines()
        if "|" in line
    ]
    by_name = {row[0]: row for row in rows}
    assert by_name["teacher"][1:6] == ["0.8000 ± 0.0100", "100.0%", "4.0 M", "100.0%", "100.0 ms"]
    assert by_name["keep-0.5_criterion-fisher"][1:7] == [
        "0.7920 ± 0.0100",
        "99.0%",
        "2.0 M",
        "50.0%",
        "50.0 ms",
        "2.00x",
    ]
    assert by_name["keep-0.1_criterion-fisher"][1] == "failed" and by_name["keep-0.05_criterion-fisher"][1] == "to do"


def test_the_smallest_that_is_as_good_as_the_teacher_and_the_fastest_are_named(record):
    teacher, as_good, fastest = tiles(record)
    assert teacher.value == "0.8" and as_good.value == "50.0%" and "keep-0.5_criterion-fisher" in as_good.detail
    assert fastest.value == "4.00×" and "keep-0.25" in fastest.detail and "87.5%" in fastest.detail


def test_a_student_is_compared_with_its_own_teacher(record):
    assert "different teachers" not in sweep_notes(record) and "compare students by their speed-up" in sweep_notes(
        record
    )
    other = cell_metrics(0.6, 1e6, 25)
    other["teacher"] = {**other["teacher"], "score": 0.6}
    found = record_of(
        [("seed-0", {"seed": 0}, cell_metrics(0.795, 3e6, 70), None), ("seed-1", {"seed": 1}, other, None)]
    )
    assert "different teachers" in sweep_notes(found) and "seed-1 is the smallest" in tiles(found)[1].detail


def test_a_curve_joins_students_that_differ_in_size_alone(record):
    figure = draw_curve(record, "params", "parameters", 1e-6)
    lines = {tuple(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines}
    assert ((1.0, 0.7), (2.0, 0.792), (3.0, 0.795)) in lines and ((2.0, 0.6),) in lines and ((4.0, 0.8),) in lines


def test_before_the_first_cell_is_done_there_is_a_record_alone(tmp_path):
    write_sweep(tmp_path, record_of([("keep-0.5", {"pruning.keep": 0.5}, None, None)]))
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.json"]
