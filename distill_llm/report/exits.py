"""Exits in the report: a table, a figure, and how to read them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from distill_llm.report.drafts import draft_cells, draft_note, draft_summary, draw_drafts
from distill_llm.report.drawing import bare, new_figure, plain, save
from distill_llm.report.palette import LIGHT
from distill_llm.report.tables import Cells, markdown_table, milliseconds, percent


def exits_table(metrics: Mapping[str, Any]) -> str:
    """The cells of `exits_cells` in Markdown; empty without exits."""
    cells = exits_cells(metrics)
    return markdown_table(cells.head, cells.body) if cells.body else ""


def exits_cells(metrics: Mapping[str, Any]) -> Cells:
    """A row per threshold of the curve, the whole model first: score, layers of a row, latency, where rows left.

    Of a language model, see `draft_cells`.
    """
    found = metrics.get("exits")
    if not found:
        return Cells([], [])
    if "draft" in found:
        return draft_cells(found)
    body = []
    for point in found["curve"]:
        threshold = point["threshold"]
        name = "all layers" if threshold is None else f"{threshold:.4g}"
        name += " (in the config)" if threshold is not None and threshold == found["threshold"] else ""
        left = " / ".join(f"{100 * share:.0f}" for share in point["left"])
        time = f"{milliseconds(point['latency_ms'])} ({point['speedup']:.2f}x)"
        body.append([name, _score(point), f"{point['layers']:.2f} of {found['layers']}", time, left])
    heads = " / ".join(map(str, [*found["after"], found["layers"]]))
    return Cells(["threshold", metrics["metric"], "layers of a row", "a batch", f"% answered after {heads}"], body)


def _score(point: Mapping[str, Any]) -> str:
    error = point["standard_error"]
    return f"{point['score']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def exits_note(metrics: Mapping[str, Any]) -> str:
    """What was measured, how the threshold was chosen, and how it is set; empty without exits."""
    found = metrics.get("exits")
    if not found:
        return ""
    if "draft" in found:
        return draft_note(found, metrics["device"])
    alone = ", ".join(
        f"{row['score']:.4g} after {count}" for count, row in zip(found["after"], found["exits"], strict=True)
    )
    lines = [
        f"A row leaves at the first exit whose largest probability is above the threshold. Each exit alone, for all rows: {alone}"
        f" layers. Scores are of the test rows; times are of batches of {found['batch_size']} of them, with and without the"
        f" threshold in turn, on {metrics['device']}."
    ]
    if found["chosen"] and found["threshold"] is None:
        lines.append("No threshold kept the score on held-out rows, so none is in the config.")
    elif found["chosen"]:
        held, whole = found["held_out"], found["whole_held_out"]
        lines.append(
            f"The threshold in the config was chosen on {held['rows']:,} held-out rows: the fewest layers with a score"
            f" ({held['score']:.4g}) within {found['within']:g} standard errors of the whole model's ({_score(whole)})."
        )
    if found["threshold"] is not None:
        lines.append(
            'The student runs all layers until `model.exit_threshold = model.config.exits["threshold"]` is set'
            " (or `exit_threshold` is given to its forward)."
        )
    return " ".join(lines)


def exits_figure(metrics: Mapping[str, Any], path: Path) -> Path | None:
    """Save `draw_exits` as PNG at `path`; without exits, draws nothing and returns None."""
    figure = draw_exits(metrics)
    return None if figure is None else save(figure, path)


def draw_exits(metrics: Mapping[str, Any]) -> Figure | None:
    """The score over the measured milliseconds of a batch, at every threshold of the curve; None without exits.

    Of a language model, see `draw_drafts`.
    """
    found = metrics.get("exits")
    if not found:
        return None
    if "draft" in found:
        return draw_drafts(found)
    figure = new_figure(height=3.4)
    axes = bare(figure.subplots())
    whole, points = found["curve"][0], sorted(found["curve"], key=lambda point: point["latency_ms"])
    axes.axhline(
        whole["score"],
        color=LIGHT["ink"],
        linewidth=1.2,
        linestyle=(0, (5, 3)),
        label=f"all layers ({whole['score']:.4g})",
    )
    errors = [point["standard_error"] or 0 for point in points]
    xs, ys = [point["latency_ms"] for point in points], [point["score"] for point in points]
    axes.errorbar(
        xs,
        ys,
        yerr=errors if any(errors) else None,
        color=LIGHT["teal"],
        marker="o",
        markersize=5,
        linewidth=1.6,
        elinewidth=1,
        label="rows leave early",
        zorder=2,
    )
    for point in points:
        if point["threshold"] is not None and point["threshold"] == found["threshold"]:
            style: dict[str, Any] = {"color": LIGHT["ember"], "marker": "D", "linestyle": "none", "markersize": 8}
            axes.plot(point["latency_ms"], point["score"], **style, label="threshold in the config", zorder=3)
    axes.set_xlabel(f"milliseconds for a batch of {found['batch_size']} rows", color=LIGHT["muted"], fontsize=10)
    axes.set_title(plain(metrics["metric"]), fontsize=10, color=LIGHT["ink"], loc="left")
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    style = {"frameon": False, "labelcolor": LIGHT["ink"], "fontsize": 10, "columnspacing": 1}
    figure.legend(loc="outside lower center", ncols=3, **style)
    return figure


def exits_shown(metrics: Mapping[str, Any]) -> str:
    """What the figure shows, for those who cannot see it."""
    drafts = "draft" in (metrics.get("exits") or {})
    return "Next tokens and drafts by exit" if drafts else "Score over the time of a batch, where rows leave early"


def exits_summary(metrics: Mapping[str, Any]) -> str:
    """The result in a sentence: speed and score at the threshold of the config; empty without one."""
    found = metrics.get("exits") or {}
    if "draft" in found:
        return draft_summary(found)
    for point in found.get("curve") or ():
        if point["threshold"] is not None and point["threshold"] == found["threshold"]:
            share = percent(point["layers"] / found["layers"])
            return (
                f"With exits, rows go through {share} of its layers, which is {point['speedup']:.2f} times as fast as all,"
                f" with {metrics['metric']} {point['score']:.4g} instead of {found['curve'][0]['score']:.4g}."
            )
    return ""
