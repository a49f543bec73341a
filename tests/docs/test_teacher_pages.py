"""The recipes on the pages about teachers can be read."""

import re
from pathlib import Path

import pytest
import yaml
from builders.recipes import recipe_for

from distill_llm.recipe.recipe import parse_recipe

PAGES = Path(__file__).parents[2] / "docs" / "methods"
EXAMPLES = [
    (name, number, text)
    for name in ("ensembles", "served")
    for number, text in enumerate(re.findall(r"```yaml\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL))
]


@pytest.mark.parametrize(("name", "number", "text"), EXAMPLES)
def test_the_examples_are_recipes(tmp_path, name, number, text):
    given = yaml.safe_load(text)
    recipe = parse_recipe({**recipe_for(tmp_path), **given})
    for section, fields in given.items():
        found = recipe.model_dump(mode="json")[section]
        assert all(found[field] == value for field, value in fields.items() if not isinstance(value, dict))
