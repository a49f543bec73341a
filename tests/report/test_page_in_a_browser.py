"""report.html in a real Chromium, at the widths of a desk and of a phone, in light and dark."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.pages import GRID, full_page, page_of
from builders.reports import cell_metrics, metrics

from distill_llm.report.sweep import record_of, write_sweep

SYSTEM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    """A Chromium of the system, or the one that `playwright install chromium` downloads."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="needs the extra `browser`: pip install 'distill_llm[browser]'"
    )
    found = next(filter(None, map(shutil.which, SYSTEM)), None)
    with api.sync_playwright() as playwright:
        if found is None and not os.path.exists(playwright.chromium.executable_path):
            pytest.skip("needs a Chromium: install one, or run `playwright install chromium`")
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_the_page_fits_loads_nothing_and_is_legible(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = full_page(tmp_path).as_uri()
    page.goto(address)
    assert said == [] and asked == [address]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    outside = """width => [...document.querySelectorAll('main *')].filter(each => !each.closest('.wide, pre, svg')
        && each.getBoundingClientRect().right > width + 1).map(each => each.outerHTML.slice(0, 80))"""
    assert page.evaluate(outside, width) == []
    assert page.locator("svg[role=img]").count() == 3
    seen = page.evaluate(
        "[...document.querySelectorAll('main svg text, h1, .value, td, blockquote')].map(looks)" + LOOKS
    )
    assert len(seen) > 50
    for text, ink, ground, size in seen:
        assert contrast(ink, ground) >= 4.5, (text, ink, ground)
        assert size >= (7 if width < 390 else 9), (text, size)
    page.close()


LOOKS = """;
function looks(each) {
  const style = getComputedStyle(each), numbers = colour => colour.match(/[0-9.]+/g).map(Number);
  const unit = colour => colour.startsWith('color(') ? numbers(colour).map((n, i) => i < 3 ? n * 255 : n) : numbers(colour);
  let behind = each, ground = [0, 0, 0, 0];
  while (behind && ((ground = unit(getComputedStyle(behind).backgroundColor))[3] ?? 1) === 0) behind = behind.parentElement;
  const ink = unit(each.ownerSVGElement ? style.fill : style.color);
  const scale = each.ownerSVGElement ? Math.hypot(each.getScreenCTM().a, each.getScreenCTM().b) : 1;
  return [each.textContent.trim().slice(0, 30), ink, ground, parseFloat(style.fontSize) * scale];
}
"""
"""Of elements: their text, their colour and the one behind it, as red, green and blue, and the size of letters in pixels."""

SWEPT = [
    (
        f"keep-{keep}_criterion-{name}",
        {"pruning.keep": keep, "pruning.criterion": name},
        cell_metrics(0.7, 2e6, 50),
        None,
    )
    for keep in (0.75, 0.5)
    for name in ("fisher", "magnitude")
]


@pytest.mark.parametrize("kind", ["report", "sweep"])
def test_a_phone_shows_the_tables_without_scrolling(browser: Any, tmp_path: Path, kind: str) -> None:
    if kind == "sweep":
        write_sweep(tmp_path, record_of(SWEPT))
        file = tmp_path / "sweep.html"
    else:
        sizes = [(1, 16), (1, 32), (8, 16), (32, 16)]
        grid = [
            {**GRID[0], "batch_size": b, "sequence_length": t, "other_ms": 1341.2, "model_ms": 691.4} for b, t in sizes
        ]
        sides = {side: {**metrics()[side], "standard_error": 0.0194} for side in ("teacher", "student")}
        file = page_of(tmp_path, latency_grid=grid, speedup_min=1.68, speedup_max=2.09, **sides)
    page = browser.new_page(viewport={"width": 390, "height": 800})
    page.goto(file.as_uri())
    hidden = page.evaluate("[...document.querySelectorAll('.wide')].map(each => each.scrollWidth - each.clientWidth)")
    assert hidden and set(hidden) == {0}
    shown = [text for text in page.locator(".wide thead th:visible").all_inner_texts() if text]
    wanted = ["student", "accuracy", "of the layers", "speed-up"] if kind == "sweep" else ["teacher", "recovered"]
    assert shown[: len(wanted)] == wanted
    page.close()


def contrast(ink: list[float], ground: list[float]) -> float:
    """The ratio of WCAG 2.1, from 1 to 21."""

    def light(colour: list[float]) -> float:
        parts = [c / 255 / 12.92 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    low, high = sorted((light(ink), light(ground)))
    return (high + 0.05) / (low + 0.05)
