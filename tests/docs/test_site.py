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


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    assert sorted(re.findall(r"^\.\. auto\w+:: (\w+)$", page, re.MULTILINE)) == sorted(distill_llm.__all__)
