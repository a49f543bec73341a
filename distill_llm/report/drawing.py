"""Matplotlib figures in one style, saved as PNG, or as SVG for a page whose colours they take."""

import io
import re
from pathlib import Path

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_llm.common.files import written_whole
from distill_llm.report.palette import LIGHT

WIDTH = 4.7
"""Inches; at 72 units an inch, about as many units as a phone has pixels across: text keeps its size there."""


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure of a size in inches."""
    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor=LIGHT["card"])


def bare(axes: Axes) -> Axes:
    """Axes with a bottom line alone."""
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT["muted"])
    axes.tick_params(length=0, which="both", labelcolor=LIGHT["ink"], labelsize=10)
    axes.set_axisbelow(True)
    return axes


def plain(text: object) -> str:
    """Text that matplotlib does not read as a formula."""
    return str(text).replace("$", r"\$")


def save(figure: Figure, path: Path) -> Path:
    """Save as PNG."""
    with written_whole(path) as file:
        figure.savefig(file, format="png")
    return path


def inline(figure: Figure, label: str) -> Markup:
    """The figure as an `<svg>` element for HTML, whose colours are variables of the page's style (`--ink` for LIGHT["ink"]).

    Text stays text, in the page's font. The element scales with its container, and holds no links and no style of its own.

    Args:
        label: what the picture shows, for those who cannot see it.
    """
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    text = re.sub(r"^<svg[^>]*>", "", text)
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[a-zA-Z.]+_?\d*">', "<g>", text)  # names that every figure uses
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"(font: [^;\"']*?[\d.]+px) [^;\"]*", r"\1 var(--font)", text)
    for name, colour in LIGHT.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup(f'<svg {box[0]} role="img" aria-label="{escape(label)}">{text}')
