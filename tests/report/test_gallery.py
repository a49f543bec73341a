"""The gallery's pages: commands that can be copied, and results as they were measured."""

import re
import shlex

import pytest

from distill_llm.recipe.gallery import Entry, entries, small_run
from distill_llm.recipe.recipe import load_recipe
from distill_llm.report.gallery import overview, page


def commands_of(text: str) -> list[list[str]]:
    """The words of every command in the code blocks, as a shell reads them."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    return [shlex.split(line) for line in blocks.replace("\\\n", " ").splitlines() if line]


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_the_commands_of_a_page_are_those_that_are_run(entry):
    commands, _ = small_run(entry.name, entry.about)
    wanted = [*entry.about.before, f"distill-llm run {entry.name}", *(commands if entry.about.here else [])]
    assert commands_of(page(entry)) == [shlex.split(command) for command in wanted]


def test_settings_of_a_small_run_reach_the_recipe_through_a_shell():
    recipe = load_recipe("tinybert")
    (command,), folder = small_run("tinybert", recipe.gallery)
    words = shlex.split(command)
    assert words[:5] == ["distill-llm", "run", "tinybert", "--output-dir", str(folder)]
    assert words[5::2] == ["--set"] * len(recipe.gallery.here) and words[6::2] == recipe.gallery.here


def test_a_recipe_without_a_result_says_so_and_has_no_numbers():
    recipe = load_recipe("bert_to_distilbert")
    entry = Entry("bert_to_distilbert", recipe, recipe.gallery, None)
    assert "**Result.** None: it needs a masked language model" in page(entry)
    assert overview([entry]).splitlines()[-1].count("–") == 4


def test_a_result_shows_its_scores_with_errors_rows_seed_device_and_time():
    (entry,) = (entry for entry in entries() if entry.name == "kwon_retraining_free")
    metrics, text = entry.result.metrics, page(entry)
    for side in ("teacher", "student"):
        score, error = metrics[side]["score"], metrics[side]["standard_error"]
        assert f"{score:.4f} ± {error:.4f}" in text and f"{score:.4f}" in overview([entry])
    assert all(part in text for part in ("One seed (0)", "Scored on 2,000 rows", metrics["device"], "the run took"))
