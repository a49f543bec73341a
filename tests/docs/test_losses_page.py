"""docs/reference/losses.md lists every term, divergence and distance of the package, and its objective is one."""

import re
from pathlib import Path

import yaml

from distill_llm.losses.distances import MAP_DISTANCES, STATE_DISTANCES
from distill_llm.losses.divergences import DIVERGENCES
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.terms import BUILT_IN

TEXT = (Path(__file__).parents[2] / "docs" / "reference" / "losses.md").read_text()


def rows(heading: str) -> dict[str, str]:
    """The rows of the table under a heading, by the name in their first column."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0].split("| --- |", 1)[1]
    return {match[1]: match[2] for match in re.finditer(r"^\| `(\w+)` \|(.*)\|$", section, re.MULTILINE)}


def test_the_objective_of_the_page_is_read_and_has_every_term():
    mapping = yaml.safe_load(re.search(r"```yaml\n(.*?)```", TEXT, re.DOTALL)[1])["losses"]
    assert tuple(parse_objective(mapping).terms()) == BUILT_IN == tuple(rows("Terms"))


def test_every_divergence_is_listed_with_its_settings():
    listed = rows("Divergences of `logits`")
    assert listed.keys() == DIVERGENCES.keys()
    for name, row in DIVERGENCES.items():
        assert set(re.findall(r"`(\w+)`", listed[name])) == set(row.settings), name


def test_every_distance_is_listed():
    assert rows("Distances of `hidden` and `embeddings`").keys() == STATE_DISTANCES.keys()
    assert rows("Distances of `attention`").keys() == MAP_DISTANCES.keys()
