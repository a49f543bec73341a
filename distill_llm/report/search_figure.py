"""The figure of a search for plans: the fitness of those that live, by generation."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from distill_llm.report.drawing import bare, new_figure, save
from distill_llm.report.palette import LIGHT, SERIES


def search_figure(metrics: Mapping[str, Any], path: Path) -> Path | None:
    """Save `draw_search` as PNG at `path`; None where nothing was searched."""
    figure = draw_search(metrics)
    return None if figure is None else save(figure, path)


def draw_search(metrics: Mapping[str, Any]) -> Figure | None:
    """For every search of a run the best fitness (solid) and the median (dotted) by generation, and the plain plan's (dashed).

    What is not finite is left out. None where nothing was searched.
    """
    found = _named(metrics.get("rounds") or [])
    if not found:
        return None
    figure = new_figure(height=3.4)
    axes = bare(figure.subplots())
    for place, (name, search) in enumerate(found):
        rows = zip(*search["history"], strict=True)
        best, median = ([math.nan if each is None else each for each in row] for row in rows)
        colour, generations = LIGHT[SERIES[place % len(SERIES)]], range(len(best))
        if search["plain"] is not None:
            axes.axhline(search["plain"], color=colour, linewidth=1, linestyle=(0, (5, 3)))
        axes.plot(generations, median, color=colour, linewidth=1.2, linestyle=(0, (1, 2)))
        axes.plot(
            generations,
            best,
            color=colour,
            marker="o",
            markersize=4,
            label=name,
        )
    muted = LIGHT["muted"]
    axes.plot([], [], color=muted, linewidth=1.2, linestyle=(0, (1, 2)), label="median")
    axes.plot([], [], color=muted, linewidth=1, linestyle=(0, (5, 3)), label="plain plan")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("generation", color=muted, fontsize=10)
    axes.set_ylabel("divergence from the dense model", color=muted, fontsize=10)
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, labelcolor=LIGHT["ink"], fontsize=10)
    return figure


def _named(rounds: Sequence[Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """The searches, and what the legend calls them: by round, by cut where a round has several."""
    found = []
    for number, row in enumerate(rounds, 1):
        searches = row.get("search") or []
        for cut, search in enumerate(searches, 1):
            found.append((f"round {number}, cut {cut}" if len(searches) > 1 else f"round {number}", search))
    return found if len(found) > 1 else [("best", search) for _, search in found]
