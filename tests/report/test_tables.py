"""The tables hold the numbers of the run, in words that can be read."""

import pytest
from builders.reports import metrics

from distill_llm.report.tables import (
    columns,
    duration,
    markdown_table,
    results_table,
    retention,
    rounds_table,
)


def cells(table: str) -> dict[str, list[str]]:
    """Rows of a Markdown table by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_retention_divides_by_the_teacher_and_turns_round_where_lower_is_better() -> None:
    assert retention(0.796, 0.8) == pytest.approx(0.995)
    assert retention(2.5, 2.0, higher_is_better=False) == pytest.approx(0.8)
    assert retention(0.1, 0.0) is None


def test_results_table_shows_every_stage_of_the_last_round_against_the_teacher() -> None:
    rows = cells(results_table(metrics()))
    assert rows[""] == ["teacher", "pruned", "compensated", "recovered"]
    assert rows["accuracy"] == ["0.8000", "0.7000", "0.7600", "0.7960"]
    assert rows["retention"] == ["100.0%", "87.5%", "95.0%", "99.5%"]
    assert rows["parameters"] == ["20.0 M", *["15.0 M (75%)"] * 3]
    assert rows["parameters of the layers"] == ["10.0 M", *["5.0 M (50%)"] * 3]
    assert rows["FLOPs of a batch"] == ["4.00 G", *["2.10 G (52%)"] * 3]
    assert rows["memory of the weights"] == ["80.0 MB", *["60.0 MB (75%)"] * 3]
    assert rows["peak memory"] == ["120.0 MB", *["90.0 MB (75%)"] * 3]
    assert rows["latency of a batch"] == ["60.0 ms", *["32.0 ms (53%)"] * 3]
    assert rows["measured speed-up"] == ["1.00x", *["1.90x (1.75–2.05)"] * 3]


def test_stages_that_did_not_happen_have_no_column() -> None:
    no_compensation = {**metrics()["rounds"][0], "score_compensated": None}
    assert [c.name for c in columns(metrics(rounds=[no_compensation]))] == ["teacher", "pruned", "recovered"]
    pruned_only = {**no_compensation, "score_recovered": None}
    assert [c.name for c in columns(metrics(rounds=[pruned_only]))] == ["teacher", "pruned"]
    assert [c.name for c in columns(metrics(rounds=[]))] == ["teacher", "student"]


def test_lower_is_better_is_said_and_counted() -> None:
    given = metrics(metric="perplexity", higher_is_better=False)
    given["teacher"]["score"], given["student"]["score"] = 5.0, 6.25
    rows = cells(results_table(given))
    assert rows["perplexity (lower is better)"][-1] == "6.2500"
    assert rows["retention"][-1] == "80.0%"


def test_rounds_table_has_a_line_a_round_with_its_times() -> None:
    rows = cells(rounds_table(metrics()))
    assert rows["round"] == ["target", "layer parameters kept", "pruned", "compensated", "recovered", "time"]
    times = "statistics 9.2 s, recover 3 min 5 s"
    assert rows["1"] == ["70.0%", "69.9%", "0.7800", "0.7900", "0.8000", times]
    assert rows["2"][-1] == "statistics 42 s, recover 2 h 10 min"
    assert rounds_table(metrics(rounds=[])) == ""


def test_a_score_of_zero_is_a_score() -> None:
    zero = {**metrics()["rounds"][0], "score_pruned": 0.0}
    assert cells(rounds_table(metrics(rounds=[zero])))["1"][2] == "0.0000"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.44, "0.4 s"), (59.2, "59 s"), (60, "1 min 0 s"), (3599.7, "1 h 0 min")]
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_bar_in_a_cell_does_not_split_it() -> None:
    assert markdown_table(["a", "b"], [["x|y", "1"]]).splitlines()[2] == "| x\\|y |   1 |"
