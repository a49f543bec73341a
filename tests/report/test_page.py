"""report.html: it says what metrics.json says, shows foreign text as text, and loads nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from builders.pages import EXAMPLES, GRID, HISTORY, HOSTILE, page_of
from builders.reports import metrics


class Reader(HTMLParser):
    """What is in a page: headings, text, tags, attributes, and the texts of table rows."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.rows: list[list[str]] = []
        self.in_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "tr":
            self.rows.append([])
        self.in_cell = tag in ("td", "th") or (self.in_cell and tag != "tr")
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def close(self) -> None:
        """At the end of the page: cells without the space around them."""
        super().close()
        self.rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.text.append(data)
        if self.in_cell:
            self.rows[-1][-1] += data


def read(folder: Path, shown: dict[str, Any] | None = None, **changes: Any) -> tuple[str, Reader]:
    """The source of a page that is written for these metrics, and what is in it."""
    text = page_of(folder, shown, **changes).read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    reader.close()
    return text, reader


def test_the_numbers_of_the_page_are_those_of_the_metrics(tmp_path: Path) -> None:
    stages = {"teacher": 61.0, "round-1/prune": 9.25}
    plan = [{**row, "heads_kept": [0, 2, 3][: row["heads"]]} for row in metrics()["plan_layers"]]
    teacher = {**metrics()["teacher"], "layers": 4}
    text, page = read(
        tmp_path,
        EXAMPLES,
        history=HISTORY,
        latency_grid=GRID,
        stages=stages,
        seed=7,
        plan_layers=plan,
        teacher=teacher,
    )
    shown = " ".join(" ".join(page.text).split())
    tiles = "Score 0.796 accuracy: 99.5% of the teacher's 0.8 Size 75.0% 15.0 M of 20.0 M parameters Speed 1.90×"
    assert tiles in shown and "Memory 75.0% 90.0 MB at peak instead of 120.0 MB" in shown
    assert ["accuracy", "0.8000", "0.7000", "0.7600", "0.7960"] in page.rows
    assert ["2", "50.0%", "50.0%", "0.7000", "0.7600", "0.7960", "statistics 42 s, recover 2 h 10 min"] in page.rows
    assert ["16 tokens", "2.50× (5 → 2)", "2.50× (40 → 16)"] in page.rows
    assert ["32 tokens", "2.50× (5 → 2)", "–"] in page.rows
    assert ["layer", "heads: 3 of 16 kept", "FFN neurons: 104 of 256 kept"] in page.rows
    assert ["0", "3 of 4", "40 of 64 62.5%"] in page.rows and ["2", "attention removed", "64 of 64 100.0%"] in page.rows
    assert ["1", "layer removed"] in page.rows and ["3", "layer removed"] in page.rows
    assert text.count('<i class="kept">') == 3 and text.count("<i></i>") == 1
    assert ["teacher", "", "1 min 1 s"] in page.rows and ["round-1/prune", "", "9.2 s"] in page.rows
    assert "same answer to 87.5% of 1,234 test rows" in shown and "student good (63.4%)" in shown
    assert "Seed 7" in shown and "torch 2.13.0" in shown and "Test CPU, 2 threads" in shown
    assert text.count("<svg") == 3 and len(text) < 200_000
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', text)
    assert len(set(labels)) == 3 and page.tags.count("h1") == 1 and "viewport" in text
    for number in ("0.78", "0.79", "0.76", "teacher (0.8)", "round 1", "logits", "batch of 8"):
        assert f">{number}</text>" in text, number


def test_foreign_text_is_shown_as_text_and_paths_are_cut(tmp_path: Path) -> None:
    names = {"teacher_model": '/home/me/"><img src=x>', "metric": "a$b$<i>", "task": "</title><script>"}
    text, page = read(tmp_path, EXAMPLES, history=HISTORY, warnings=["<script>warned</script>"], **names)
    assert {"script", "img", "b"}.isdisjoint(page.tags)
    shown = "".join(page.text)
    assert HOSTILE.split("\x00")[0] in shown and "<script>warned</script>" in shown
    assert "<b>bad</b>" in shown and "$x<b>$" in shown and "a$b$<i>" in shown
    assert 'dir="auto"' in text and "secret" not in text and "/home/me" not in text


def test_the_page_loads_nothing_and_runs_nothing(tmp_path: Path) -> None:
    text, page = read(tmp_path, EXAMPLES, history=HISTORY, latency_grid=GRID)
    assert {"script", "link", "iframe", "img", "object"}.isdisjoint(page.tags)
    for tag, name, value in page.attributes:
        assert name not in ("src", "srcset", "action", "data") and not name.startswith("on"), (tag, name)
        assert not name.endswith("href") or value.startswith("#"), (tag, value)
        assert "//" not in value, (tag, name, value)
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1 and "@import" not in style[0] and "url(" not in style[0]
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in style[0]
    assert not re.findall(r"#[0-9a-f]{6}", text.replace(style[0], ""))  # every colour follows the system's setting
    defined = set(re.findall(r"(--[a-z]+):", text))
    assert set(re.findall(r"var\((--[a-z]+)\)", text)) <= defined


@pytest.mark.parametrize("lower", [False, True])
def test_what_a_run_does_not_have_leaves_nothing_empty(tmp_path: Path, lower: bool) -> None:
    small: dict[str, Any] = {"rounds": [], "plan_layers": [], "speedup": None}
    if lower:
        small |= {"metric": "perplexity", "higher_is_better": False, "retention": None}
    text, page = read(tmp_path, **small)
    assert "<svg" not in text and "<figure" not in text
    shown = " ".join(" ".join(page.text).split())
    for name in ("Rounds", "layer keeps", "over size", "over time", "over batch", "disagree", "Speed 1", "None", "nan"):
        assert name not in shown, name
    assert ("perplexity; the teacher has 0.8" in shown) == lower
    assert not re.search(r"<(section|div|dl|table|tbody|ol)[^>]*>\s*</", text)


def test_the_page_takes_rows_of_a_language_model(tmp_path: Path) -> None:
    row = {"row": 0, "distance": 3.1, "truth": None, "text": "a\nb"}
    row |= {"teacher": {"says": "loss 2.1", "share": None}, "student": {"says": "loss 5.2", "share": None}}
    _, page = read(tmp_path, json.loads(json.dumps({"rows": 8, "agreement": None, "examples": [row]})))
    shown = " ".join(" ".join(page.text).split())
    assert "Of 8 test rows." in shown and "teacher loss 2.1 student loss 5.2" in shown
