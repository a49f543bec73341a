"""Exits in report.md, report.html and the card: the table, the words and the figure, and nothing without them."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from builders.reports import metrics, student_folder
from matplotlib.image import imread

from distill_llm.report import write_card, write_page, write_report
from distill_llm.report.exits import draw_exits, exits_cells, exits_note, exits_summary, exits_table


def point(threshold: float | None, score: float, layers: float, ms: float, left: list[float]) -> dict[str, Any]:
    return {
        "threshold": threshold,
        "score": score,
        "standard_error": 0.01,
        "layers": layers,
        "left": left,
        "latency_ms": ms,
        "speedup": 20 / ms,
    }


CURVE = [
    point(None, 0.91, 6, 20, [0, 0, 1]),
    point(0.97, 0.905, 4.5, 16, [0.25, 0.25, 0.5]),
    point(0.6, 0.8, 3, 10, [0.5, 0.5, 0]),
]
EXITS: dict[str, Any] = {
    "after": [2, 4],
    "layers": 6,
    "threshold": 0.97,
    "chosen": True,
    "within": 1.0,
    "held_out": {**CURVE[1], "score": 0.9, "rows": 1000},
    "whole_held_out": {**CURVE[0], "score": 0.908},
    "exits": [point(None, 0.75, 2, 1, [1, 0, 0]), point(None, 0.85, 4, 1, [0, 1, 0])],
    "batch_size": 32,
    "curve": CURVE,
}


def test_the_table_has_a_row_for_each_threshold_and_the_words_say_how_it_was_chosen() -> None:
    given = metrics(exits=EXITS)
    cells = exits_cells(given)
    assert cells.head == ["threshold", "accuracy", "layers of a row", "a batch", "% answered after 2 / 4 / 6"]
    assert cells.body[0] == ["all layers", "0.91 ± 0.01", "6.00 of 6", "20.0 ms (1.00x)", "0 / 0 / 100"]
    assert cells.body[1] == ["0.97 (in the config)", "0.905 ± 0.01", "4.50 of 6", "16.0 ms (1.25x)", "25 / 25 / 50"]
    assert cells.body[2][0] == "0.6"
    note = exits_note(given)
    assert "0.75 after 2, 0.85 after 4 layers" in note and "chosen on 1,000 held-out rows" in note
    assert "(0.9) within 1 standard errors of the whole model's (0.908 ± 0.01)" in note
    assert 'model.exit_threshold = model.config.exits["threshold"]' in note
    assert "75.0% of its layers, which is 1.25 times as fast" in exits_summary(given)
    none = metrics(exits={**EXITS, "threshold": None})
    assert "No threshold kept the score" in exits_note(none) and exits_summary(none) == ""


DRAFTS: dict[str, Any] = {
    "after": [2, 4],
    "layers": 6,
    "draft": 4,
    "exits": [
        {"layers": 2, "perplexity": 30.0, "agreement": 0.5, "accepted": 0.4, "tokens_per_run": 1.5}
        | {"tokens_per_second": 9.0, "speedup": 0.9, "speedup_error": 0.05, "same": 8},
        {"layers": 4, "perplexity": 20.0, "agreement": 0.8, "accepted": 0.75, "tokens_per_run": 3.25}
        | {"tokens_per_second": 13.0, "speedup": 1.3, "speedup_error": None, "same": 7},
    ],
    "whole": {"layers": 6, "perplexity": 15.0, "agreement": 1.0, "tokens_per_second": 10.0},
    "texts": 8,
    "new_tokens": 64,
}


def test_a_language_models_table_has_a_row_for_each_exit_and_the_words_say_how_it_drafts() -> None:
    given = metrics(exits=DRAFTS)
    cells = exits_cells(given)
    assert cells.body[0] == ["6 (all)", "15", "", "", "1.00", "10.0"]
    assert cells.body[1] == ["2", "30", "50.0%", "40.0%", "1.50", "9.0 (0.90 ± 0.05x)"]
    assert cells.body[2] == ["4 (in the config)", "20", "80.0%", "75.0%", "3.25", "13.0 (1.30x)"]
    note = exits_note(given)
    assert "8 text(s) of at most 64 new tokens" in note and "by rounding: 1 after 4." in note
    assert 'assistant_early_exit=model.config.exits["draft"]' in note
    assert exits_summary(given).startswith("With drafts by its first 4 of 6 layers it writes 1.30 times as fast: 75.0%")
    none = metrics(exits={**DRAFTS, "draft": None})
    assert "none is in the config" in exits_note(none) and exits_summary(none) == ""
    drawn = draw_exits(given)
    assert drawn is not None
    agreement, accepted = drawn.axes[0].get_lines()
    assert list(agreement.get_ydata()) == [50, 80] and list(accepted.get_ydata()) == [40, 75]


def test_nothing_is_shown_without_exits(tmp_path: Path) -> None:
    assert (exits_table(metrics()), exits_note(metrics()), exits_summary(metrics())) == ("", "", "")
    assert draw_exits(metrics()) is None and exits_cells(metrics()).body == []


@pytest.mark.slow
def test_report_page_and_card_show_them(tmp_path: Path) -> None:
    config = {"auto_map": {"AutoModelForSequenceClassification": "modeling_exits.X"}, "exits": {"after": [2, 4]}}
    student_folder(tmp_path / "student", architecture="ExitBertForSequenceClassification", **config)
    given = metrics(exits=EXITS)
    text = write_report(tmp_path, given).read_text()
    assert "## Early exits" in text and exits_table(given).rstrip() in text and exits_note(given) in text
    height, width, _ = imread(tmp_path / "figures" / "exits.png").shape
    assert width > height > 200
    recipe = yaml.safe_dump({"teacher": {"model": "x"}, "data": {"task": "sst2"}})
    page = write_page(tmp_path, given, {}, recipe).read_text()
    assert 'id="exits"' in page and "0.97 (in the config)" in page and "Score over the time of a batch" in page
    assert 'id="exits"' not in write_page(tmp_path, metrics(), {}, recipe).read_text()
    card = write_card(tmp_path / "student", given, recipe).read_text()
    assert "### Early exits" in card and "without `trust_remote_code=True` it is the same model without exits" in card
