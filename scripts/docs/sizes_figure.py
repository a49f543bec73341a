"""Draw docs/images/sizes.png from a table of scripts/bench/RESULTS.md: `python scripts/docs/sizes_figure.py`."""

import re
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "images" / "sizes.png"
HEADING = "## Pruning alone, beside other tools"
LINES = {
    "ours: fisher, compensated": ("distill_llm", "#1f7a8c", "o-"),
    "TextPruner, unequal layers, 4 iterations": ("TextPruner 1.1", "#e0a030", "D--"),
    "torch-pruning Taylor, global": ("torch-pruning 1.6.1, Taylor", "#8a5fa8", "s--"),
    "plain magnitude": ("magnitude of the weights", "#c8553d", "v--"),
}
# Of the panel: its title, its first column in the table, the whole model's score there and the standard error of a score.
PANELS = (("SST-2, accuracy", 0, 0.8956, 0.010), ("CoLA, Matthews correlation", 6, 0.3014, 0.030))
SHARES = (0.7, 0.5, 0.3)
INK = "#2b2d33"


def table(text: str) -> dict[str, list[float]]:
    """The rows of the first table under the heading, by the name in their first column."""
    rows = re.findall(r"^\| ([^|\n]+) \|((?: [*\d.-]+ \|)+)$", text.split(HEADING)[1], re.MULTILINE)
    found: dict[str, list[float]] = {}
    for name, cells in rows:
        found.setdefault(name, [float(cell.strip(" *")) for cell in cells.strip("|").split("|")])
    return found


def draw(rows: dict[str, list[float]], path: Path) -> None:
    """A panel for each task: the score without training over the share of the layers' parameters that stays."""
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    for axes, (title, first, whole, error) in zip(figure.subplots(1, 2), PANELS, strict=True):
        axes.axhspan(whole - error, whole + error, color=INK, alpha=0.08, linewidth=0)
        axes.axhline(whole, color=INK, linewidth=1, linestyle=(0, (5, 3)), label="whole model ± a standard error")
        for name, (label, colour, style) in LINES.items():
            scores = rows[name][first : first + len(SHARES)]
            axes.plot([1.0, *SHARES], [whole, *scores], style, color=colour, label=label, linewidth=1.8)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xticks([1.0, *SHARES], ["100%", *(f"{share:.0%}" for share in SHARES)])
        axes.invert_xaxis()
        axes.set_xlabel("parameters of the layers that stay")
        axes.grid(axis="y", color="#e4e6ea")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    draw(table((ROOT / "scripts" / "bench" / "RESULTS.md").read_text()), PICTURE)
