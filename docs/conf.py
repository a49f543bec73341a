"""The site, built from these Markdown pages and the docstrings: `make docs`."""

import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

import distill_llm

project = "distill_llm"
copyright = "the authors of distill_llm, Apache-2.0"
release = version = distill_llm.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = f"distill_llm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_output_stderr = "remove"  # bars and notices
nb_execution_mode = "off"  # the notebook is shown as its last run left it; a test runs it
highlight_language = "bash"  # of indented blocks; they are commands
default_role = "code"  # docstrings write `name`, as Markdown does
copybutton_exclude = ".linenos, .gp, .go"

autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "inherited-members": False}
napoleon_attr_annotations = False
napoleon_use_rtype = False

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
PAGES = {
    "RESULTS.md": "results",
    "README.md": "benchmarks",
    "RELIABILITY.md": "what-a-run-survives",
}  # and their headings


def to_pages_of_the_site(app: Sphinx, docname: str, source: list[str]) -> None:
    """Show the pages of scripts/bench, the help of every command and all public names; keep links within the site."""
    if docname == "reference/cli":
        source[0] += commands()
    if docname == "reference/api":
        source[0] += further_names(source[0])
    if docname == "benchmarks":
        texts = [(BENCH / page).read_text() for page in PAGES]
        source[0] = "\n\n".join([texts[0], *(re.sub(r"^# ", "## ", text) for text in texts[1:])])
        source[0] = source[0].replace("](../../docs/", "](")
    up = "../" * docname.count("/")
    for page, heading in PAGES.items():
        inside = r"\]\(" if docname == "benchmarks" else r"\]\((?:\.\./)+scripts/bench/"
        to = f"]({up}benchmarks.md#"
        source[0] = re.sub(rf"{inside}{page}#", to, source[0])
        source[0] = re.sub(rf"{inside}{page}\)", f"{to}{heading})", source[0])


def commands() -> str:
    """Every command with its arguments and options, from their help."""
    import click
    from typer.cli import get_docs_for_click
    from typer.main import get_command

    from distill_llm.cli.main import app

    group = get_command(app)
    text = get_docs_for_click(obj=group, ctx=click.Context(group, info_name="distill-llm"), name="distill-llm")
    return "\n" + re.sub(r"^# `", "## `", text, flags=re.MULTILINE)


def further_names(page: str) -> str:
    """The public names that the page does not name yet."""
    lines = [f".. auto{documented(name)}:: {name}" for name in distill_llm.__all__ if f":: {name}\n" not in page]
    return "\n".join(["\n## Further names\n", "```{eval-rst}", *lines, "```", ""]) if lines else ""


def documented(name: str) -> str:
    """What autodoc calls a public name's kind."""
    return "class" if isinstance(getattr(distill_llm, name), type) else "function"


def visit_math(translator: HTML5Translator, node: nodes.Element) -> None:
    """Formulas as MathML, which browsers draw by themselves: a page needs no script and no network."""
    block = isinstance(node, nodes.math_block)
    try:
        translator.body.append(tex2mathml(node.astext(), as_block=block))
    except MathError as problem:
        logging.getLogger(__name__).warning("%s: %s", node.astext(), problem, location=node)
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("source-read", to_pages_of_the_site)


html_math_renderer = "mathml"
