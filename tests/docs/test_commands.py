"""The commands of the README and of all pages exist, with the options that they are given."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from distill_llm.cli.main import app
from distill_llm.recipe.recipe import Recipe

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = get_command(app).commands


def commands(page: Path) -> list[list[str]]:
    """The words of every `distill-llm` line in the page's blocks of code, lines that go on joined, comments left out."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?:    |\$ )?(distill-llm [^|>\n]*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def unknown(words: list[str]) -> list[str]:
    """What of a command line does not exist: the command, an option, or the section of a field that is set."""
    own = [name for name in words[1:] if not name.startswith("-")]
    if not own or own[0] not in COMMANDS:
        return own[:1]
    known = {option for parameter in COMMANDS[own[0]].params for option in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "-h", "-q", "--quiet"}
    found = [word for word in words[1:] if re.match(r"--?[a-z]", word) and word.split("=")[0] not in known]
    fields = [words[place + 1].split("=")[0] for place, word in enumerate(words) if word == "--set"]
    return found + [field for field in fields if field.split(".")[0] not in Recipe.model_fields]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_of_pages_exist(page: Path) -> None:
    assert {" ".join(words): found for words in commands(page) if (found := unknown(words))} == {}


def test_an_option_that_does_not_exist_is_found() -> None:
    assert unknown(["distill-llm", "run", "x", "--sett", "a=1"]) == ["--sett"]
    assert unknown(["distill-llm", "runn", "x"]) == ["runn"]
    assert unknown(["distill-llm", "run", "x", "--set", "prunning.keep=1"]) == ["prunning.keep"]
    assert len(commands(ROOT / "README.md")) >= 5
