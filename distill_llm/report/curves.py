"""sweep.html: the trade-off curves of a sweep, the score of every student over what it costs, on one page."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from distill_llm.report.drawing import bare, inline, new_figure, plain
from distill_llm.report.page import TEMPLATES, Tile
from distill_llm.report.palette import DARK, LIGHT, SERIES
from distill_llm.report.tables import MISSING, Cells, latency_note, percent, score_note
from distill_llm.report.tables import count as count_of

COSTS = (
    ("params", "parameters (millions)", 1e-6),
    ("latency_ms", "latency of a batch (ms)", 1.0),
    ("peak_memory_mb", "peak memory (MB)", 1.0),
    ("flops", "FLOPs of a batch (billions)", 1e-9),
)
"""What the score is drawn over: a part of metrics.json, what it is called on the page, and its unit."""
MARKERS = "oDv^sP"
KEEP = "pruning.keep"


def sweep_page(record: Mapping[str, Any], title: str, cells: Cells) -> str:
    """The page.

    Args:
        record: what `sweep.json` holds, with at least one finished cell.
        title: of the page.
        cells: the table.
    """
    drawn = [(name, draw_curve(record, part, name, unit)) for part, name, unit in COSTS]
    charts = [(name, inline(figure, f"{record['metric']} over {name}")) for name, figure in drawn if figure is not None]
    return TEMPLATES.get_template("sweep.html.jinja").render(
        light=LIGHT,
        dark=DARK,
        record=record,
        title=title,
        tiles=tiles(record),
        charts=[(name, Markup(figure)) for name, figure in charts],
        cells=cells,
        notes=sweep_notes(record),
        failed=[cell for cell in record["cells"] if "error" in cell],
    )


def sweep_notes(record: Mapping[str, Any]) -> str:
    """What the numbers are of, and what may be compared."""
    found = [score_note({**record, "student": record["teacher"]}), latency_note({**record, "speedup": 1})]
    if any(cell.get("speedup") is not None for cell in record["cells"]):
        found.append("Latencies were measured run by run, so compare students by their speed-up.")
    if len({cell["teacher_score"] for cell in record["cells"] if "student" in cell}) > 1:
        found.append(
            "The students have different teachers: shown is the first; retention and speed-up are with their own."
        )
    return " ".join(filter(None, found))


def tiles(record: Mapping[str, Any]) -> list[Tile]:
    """The teacher, the smallest student that is within one standard error of its own teacher, and the fastest."""
    teacher = record["teacher"]
    found = [
        Tile("Teacher", f"{teacher['score']:.4g}", f"{record['metric']}, {count_of(teacher['params'])} parameters")
    ]
    sign, error = 1 if record["higher_is_better"] else -1, teacher.get("standard_error") or 0.0
    done = [cell for cell in record["cells"] if "student" in cell]
    as_good = [cell for cell in done if sign * (cell["student"]["score"] - cell["teacher_score"]) >= -error]
    if as_good:
        best = min(as_good, key=lambda cell: cell["student"]["params"])
        what = f"{best['name']} is the smallest within one standard error"
        found.append(Tile("As good as the teacher", percent(best["params_kept"]), f"of the parameters: {what}"))
    timed = [cell for cell in done if cell.get("speedup") is not None]
    if timed:
        fastest = max(timed, key=lambda cell: cell["speedup"])
        kept = percent(fastest["retention"]) if fastest.get("retention") is not None else MISSING
        found.append(Tile("Fastest", f"{fastest['speedup']:.2f}×", f"{fastest['name']}, retention {kept}"))
    return found


def draw_curve(record: Mapping[str, Any], part: str, name: str, unit: float) -> Figure | None:
    """The score of every student, with its standard error, over one of its costs, and the teacher's as a line.

    A line joins the students that differ in size alone. None where the cost was not measured.
    """
    series: dict[str, list[Mapping[str, Any]]] = {}
    for cell in record["cells"]:
        if "student" in cell and cell["student"].get(part) is not None:
            others = (f"{field.rpartition('.')[2]} {value}" for field, value in cell["values"].items() if field != KEEP)
            series.setdefault(", ".join(others), []).append(cell)
    if not series:
        return None
    figure, teacher = new_figure(height=3.6), record["teacher"]
    axes = bare(figure.subplots())
    label = f"teacher ({teacher['score']:.4g})"
    axes.axhline(teacher["score"], color=LIGHT["ink"], linewidth=1.2, linestyle=(0, (5, 3)), label=label, zorder=1)
    if teacher.get("standard_error"):
        low, high = (teacher["score"] + side * teacher["standard_error"] for side in (-1, 1))
        axes.axhspan(low, high, color=LIGHT["line"], alpha=0.5, linewidth=0, zorder=0)
    if teacher.get(part) is not None:
        axes.plot(unit * teacher[part], teacher["score"], marker="s", color=LIGHT["ink"], markersize=7, zorder=3)
    for number, (name_of, cells) in enumerate(series.items()):
        cells.sort(key=lambda cell: cell["student"][part])
        colour, errors = (
            LIGHT[SERIES[number % len(SERIES)]],
            [cell["student"].get("standard_error") or 0 for cell in cells],
        )
        axes.errorbar(
            [unit * cell["student"][part] for cell in cells],
            [cell["student"]["score"] for cell in cells],
            yerr=errors if any(errors) else None,
            color=colour,
            marker=MARKERS[number % len(MARKERS)],
            markersize=7,
            linewidth=1.6,
            elinewidth=1,
            capsize=3,
            label=plain(name_of or "students"),
            zorder=2,
        )
        if len(series) == 1 and len(cells) <= len(SERIES):
            for cell in cells:
                _name(axes, cell, unit * cell["student"][part])
    axes.set_xlabel(name, color=LIGHT["muted"], fontsize=10)
    lower = "" if record["higher_is_better"] else " (lower is better)"
    axes.set_title(plain(f"{record['metric']}{lower}"), fontsize=10, color=LIGHT["ink"], loc="left")
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    axes.margins(x=0.1, y=0.15)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=10, labelcolor=LIGHT["ink"])
    return figure


def _name(axes: Any, cell: Mapping[str, Any], x: float) -> None:
    """What sets a student apart, beside its point."""
    values = " ".join(str(value) for value in cell["values"].values())
    style: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9, "color": LIGHT["muted"], "va": "top"}
    axes.annotate(plain(values), (x, cell["student"]["score"]), (6, -6), **style)
