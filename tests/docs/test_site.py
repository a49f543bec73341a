"""The site: it builds without a warning, so every link of every page leads somewhere, and it has every public name."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import distill_llm

ROOT = Path(__file__).parents[2]
needs_site = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo", "sphinx_copybutton")),
    reason="needs the extra docs: pip install -c constraints.txt -e '.[docs]'",
)


@pytest.mark.slow
@needs_site
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = ["-m", "sphinx", "-q", "-W", "--keep-going", "-d", tmp_path / "trees", ROOT / "docs", tmp_path / "site"]
    built = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    commands = (tmp_path / "site" / "reference" / "cli.html").read_text()
    assert all(f'id="distill-llm-{name}"' in commands for name in ("run", "prune", "evaluate", "export"))
    names = (tmp_path / "site" / "reference" / "api.html").read_text()
    assert [name for name in distill_llm.__all__ if f'id="distill_llm.{name}"' not in names] == []


def test_the_site_can_show_every_formula() -> None:
    """The site's writer knows a part of LaTeX; building it takes a minute, reading its formulas none."""
    reader = pytest.importorskip("docutils.utils.math.latex2mathml", reason="needs the extra docs")
    unknown = []
    for page in (ROOT / "docs").rglob("*.md"):
        text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
        for block, inline in re.findall(r"\$\$(.+?)\$\$|\$([^$\n]+)\$", text, flags=re.DOTALL):
            try:
                reader.tex2mathml(block.strip() or inline)
            except Exception as problem:
                unknown.append(f"{page.name}: {block or inline}: {problem}")
    assert unknown == []


@pytest.mark.slow
def test_every_method_has_its_formula_on_a_page() -> None:
    from distill_llm.losses.distances import MAP_DISTANCES, STATE_DISTANCES
    from distill_llm.losses.divergences import DIVERGENCES
    from distill_llm.losses.terms import BUILT_IN
    from distill_llm.pruning.criteria import CRITERIA
    from distill_llm.pruning.names import UNITS
    from distill_llm.pruning.units.costs import COSTS

    text = "".join(page.read_text() for page in (ROOT / "docs" / "methods").glob("*.md"))
    names = {*DIVERGENCES, *STATE_DISTANCES, *MAP_DISTANCES, *BUILT_IN, *CRITERIA, *UNITS, *COSTS}
    assert sorted(name for name in names if f"`{name}`" not in text) == []
