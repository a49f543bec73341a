"""The documentation: pages that are made from the code are up to date, and links lead somewhere."""

import importlib.util
import re
from pathlib import Path

import pytest

import distill_llm

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def script(name: str):
    """A script of scripts/docs as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["recipe_reference", "gallery"])
def test_pages_made_from_the_code_are_up_to_date(name: str) -> None:
    made = script(name)
    assert made.PAGE.read_text() == made.render(), "run `make docs`"


def test_changes_and_citation_are_of_this_version() -> None:
    assert f"\n## [{distill_llm.__version__}] - " in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {distill_llm.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_picture_of_the_readme_shows_rows_of_the_results() -> None:
    made, text = script("sizes_figure"), (ROOT / "scripts" / "bench" / "RESULTS.md").read_text()
    rows = made.table(text)
    assert [len(rows[name]) for name in made.LINES] == [9] * len(made.LINES)
    assert rows["plain magnitude"][:3] == [0.8853, 0.7729, 0.6571]
    section = text.split(made.HEADING)[1]
    assert all(
        f"(dense\n{whole:.4f})" in section or f"(dense {whole:.4f})" in section for _, _, whole, _ in made.PANELS
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


def test_the_readme_is_short_and_names_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    assert "make quickstart" in text and "make test" in text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_do_not_run_off_the_page(page: Path) -> None:
    for line in page.read_text().splitlines():
        assert len(line) <= 100 or not re.match(r"    (distill-llm|pip|make|accelerate) ", line), line


def test_every_room_is_on_the_map() -> None:
    text = (ROOT / "docs" / "development" / "house.md").read_text()
    package = Path(distill_llm.__file__).parent
    for room in package.iterdir():
        if (room / "__init__.py").is_file():
            assert f"| `{room.name}/` |" in text
