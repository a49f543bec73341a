"""YAML that cannot be a recipe: each gives one line that names its place, quickly, and runs nothing."""

from pathlib import Path

import pytest
import yaml

from distill_llm.common.errors import InputError
from distill_llm.recipe.recipe import load_recipe, parse_recipe
from distill_llm.recipe.yaml_input import DEEPEST, MOST_VALUES, read_mapping

NESTED = {"lists": "a: " + "[" * 3000 + "]" * 3000, "mappings": "{a: " * 3000 + "1" + "}" * 3000}
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 500))


@pytest.mark.parametrize(
    ("text", "place", "word"),
    [
        ("a: 1\non: 2\n", "line 2", "'on' is read as True"),
        ("a: 1\nb:\n  1: 2\n", "line 3", "'1' is read as 1"),
        ("a: 1\nnull: 2\n", "line 2", "read as None"),
        ("a: 1\nseed: !!int x\n", "line 2", "'x' is not a valid int"),
        ("a: 1\nseed: !!int ''\n", "line 2", "'' is not a valid int"),
        ("a: 1\nseed: !!bool x\n", "line 2", "'x' is not a valid bool"),
        ("a: 1\nseed: 2020-13-45\n", "line 2", "not a valid timestamp; put it in quotes"),
        ("a: 1\nseed: " + "9" * 5000, "line 2", "not a valid int"),
        ("a: 1\nb: !!map x\n", "line 2", "expected a mapping"),
        ("a: 1\nb: !!set {x}\n", "line 2", "set"),
        ("a: 1\nb: !!python/object/apply:os.system [x]\n", "line 2", "os.system"),
        ('a: 1\nb: "\\0"\n', "line 2", "a NUL"),
        ('a: 1\nb: "\\ud800"\n', "line 2", "surrogate"),
        ("a: 1\nb: &b [*b]\n", "line 2", "a part of"),
        ("a: 1\n" + NESTED["lists"].replace("a:", "b:"), "line 2", f"more than {DEEPEST} lists"),
        ("b: 1\n" + BOMB, "line", f"more than {MOST_VALUES:,} values"),
        ("b: 1\n" + CHAIN, "line", f"more than {DEEPEST} lists"),
    ],
)
def test_yaml_that_cannot_be_read_names_its_line(tmp_path, monkeypatch, text, place, word):
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load_recipe("recipe.yaml")
    line = str(error.value)
    assert line.startswith(f"recipe.yaml {place}") and word in line and len(line.splitlines()) == 1


def test_what_fits_the_limits_is_read_as_pyyaml_reads_it():
    deep = "[" * (DEEPEST - 2) + "1" + "]" * (DEEPEST - 2)
    shared = "{base: &base {x: 1, y: [2, 3]}, own: {<<: *base, y: 4}, again: *base}"
    for text in (f"a: {deep}", f"a: {shared}", "a: 2020-01-02", "a: &a text\nb: *a", "{a: [" + "1, " * 5_000 + "]}"):
        assert read_mapping(text, "field") == yaml.safe_load(text)


@pytest.mark.parametrize("name", [1, None, 2.5])
@pytest.mark.parametrize("section", ["distillation", "pruning", "data"])
def test_a_name_that_is_no_text_is_a_fault_in_python_too(section, name):
    sections = {"teacher": {"model": "x"}, "data": {"task": "sst2"}, "pruning": {"keep": 0.5}, "distillation": {}}
    sections[section][name] = 1
    with pytest.raises(InputError, match=rf"{section}\.{name}: got |{name}: not given") as error:
        parse_recipe(sections)
    assert len(str(error.value).splitlines()) == 1
