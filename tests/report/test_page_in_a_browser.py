"""report.html in a real Chromium, at the widths of a desk and of a phone, in light and dark."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from builders.pages import full_page

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


def contrast(ink: list[float], ground: list[float]) -> float:
    """The ratio of WCAG 2.1, from 1 to 21."""

    def light(colour: list[float]) -> float:
        parts = [c / 255 / 12.92 if c <= 10.31 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
        return sum(share * part for share, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    low, high = sorted((light(ink), light(ground)))
    return (high + 0.05) / (low + 0.05)
