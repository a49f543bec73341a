"""The figures of a run: the score over the size, what every layer keeps, the losses, and the latency."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from distill_llm.report.drawing import bare, new_figure, plain, save
from distill_llm.report.palette import LIGHT, SERIES

INK, MUTED, EMPTY = LIGHT["ink"], LIGHT["muted"], LIGHT["line"]
STAGES = {"pruned": ("ember", "v"), "compensated": ("gold", "D"), "recovered": ("teal", "o")}
UNITS = {"heads": "teal", "queries": "gold", "neurons": "ember"}
MOST_LABELS = 6
"""Rounds and trainings that are labelled one by one."""


def score_figure(metrics: Mapping[str, Any], path: Path) -> Path | None:
    """Save `draw_scores` as PNG at `path`. For a run without rounds, draws nothing and returns None."""
    figure = draw_scores(metrics)
    return None if figure is None else save(figure, path)


def draw_scores(metrics: Mapping[str, Any]) -> Figure | None:
    """The score after every stage of every round over the size of the model, and the teacher's as a line.

    None for a run without rounds.
    """
    rounds = metrics.get("rounds") or []
    sizes = [each.get("layer_params_kept") for each in rounds]
    known = None not in sizes
    xs = [100 * size for size in sizes] if known else range(1, len(rounds) + 1)
    steps = [
        [(x, each[f"score_{stage}"], stage) for stage in STAGES if each.get(f"score_{stage}") is not None]
        for x, each in zip(xs, rounds, strict=True)
    ]
    points = [point for step in steps for point in step]
    if not points:
        return None
    figure = new_figure(height=3.7)
    axes = bare(figure.subplots())
    teacher = metrics["teacher"]["score"]
    axes.axhline(teacher, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"teacher ({teacher:.4g})", zorder=1)
    start = (100 if known else 0, teacher)
    path = [start, *((x, y) for x, y, _ in points)]
    axes.plot(*zip(*path, strict=True), color=MUTED, linewidth=1.2, alpha=0.6, zorder=1)
    axes.plot(*start, marker="s", color=INK, markersize=7, zorder=3)
    for stage, (colour, marker) in STAGES.items():
        mine = [(x, y) for x, y, name in points if name == stage]
        if mine:
            style: dict[str, Any] = {"color": LIGHT[colour], "edgecolor": LIGHT["card"], "s": 60, "zorder": 3}
            axes.scatter(*zip(*mine, strict=True), marker=marker, label=stage, **style)
    scores = [teacher, *(y for _, y, _ in points)]
    room = max(max(scores) - min(scores), 0.005)
    axes.set_ylim(min(scores) - 0.15 * room, max(scores) + 0.12 * room)
    far = abs(start[0] - points[-1][0]) or 1
    left, right = (start[0] - far * n if known else start[0] + far * n for n in (-0.06, 1.2))
    axes.set_xlim(left, right)
    low, high = axes.get_ylim()
    for step in steps if len(steps) <= MOST_LABELS else steps[-1:]:
        _label_apart(axes, step, unit=(high - low) / 190)
    axes.set_xlabel("parameters of the layers kept, in %" if known else "round", color=MUTED, fontsize=10)
    arrow = "" if metrics.get("higher_is_better", True) else " (lower is better)"
    axes.set_ylabel(plain(f"{metrics['metric']}{arrow}"), color=MUTED, fontsize=10)
    axes.grid(axis="y", color=EMPTY, linewidth=0.8)
    figure.legend(
        loc="outside upper center",
        ncols=3,
        frameon=False,
        labelcolor=INK,
        fontsize=10,
        handletextpad=0.3,
        columnspacing=1,
    )
    return figure


def _label_apart(axes: Axes, step: Sequence[tuple[float, float, str]], unit: float) -> None:
    """Write the scores of a round at the right of their marks, none on another.

    Args:
        unit: of the score, that a printer's point is high.
    """
    height, last = 11 * unit, float("-inf")
    for x, y, _ in sorted(step, key=lambda point: point[1]):
        last = max(y, last + height)
        where: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9.5, "zorder": 4}
        axes.annotate(f"{y:.4g}", (x, y), (7, (last - y) / unit), color=INK, **where)


def kept_figure(metrics: Mapping[str, Any], path: Path) -> Path | None:
    """Draw the kept heads and FFN neurons of every layer of the teacher over the original ones; save it as PNG at `path`.

    Where queries share keys and values, heads are KV groups, and query heads get bars of their own. A removed layer (one that
    `plan_layers` does not list) gets an empty bar; so does a removed attention or FFN. A line of text gives the number of kept
    channels of the residual stream (`plan_hidden`). For a run without a plan, draws nothing and returns None.
    """
    kept = {layer["source"]: layer for layer in metrics.get("plan_layers") or []}
    if not kept:
        return None
    any_layer = next(iter(kept.values()))
    layers = range(max(metrics["teacher"].get("layers") or 0, max(kept) + 1))
    grouped = "queries" in any_layer
    units = [unit for unit in UNITS if grouped or unit != "queries"]
    titles = {
        "heads": "KV groups" if grouped else "attention heads",
        "queries": "query heads",
        "neurons": "FFN neurons",
    }
    figure = new_figure(width=4 * len(units), height=max(2.4, 1.2 + 0.3 * len(layers)))
    for axes, unit in zip(figure.subplots(1, len(units), sharey=True), units, strict=True):
        bare(axes)
        whole = [kept.get(i, any_layer)[f"{unit}_of"] for i in layers]
        left = [kept[i][unit] if i in kept else 0 for i in layers]
        axes.barh(layers, whole, color=EMPTY, height=0.72)
        axes.barh(layers, left, color=LIGHT[UNITS[unit]], height=0.72)
        for i in layers:
            block = "FFN" if unit == "neurons" else "attention"
            text = f"{left[i]} / {whole[i]}" if left[i] or not whole[i] else f"{block} removed"
            text = text if i in kept else "layer removed"
            axes.annotate(text, (whole[i], i), (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
        axes.set_xlim(0, 1.3 * max(*whole, 1))
        axes.set_title(f"{titles[unit]}: {sum(left):,} of {sum(whole):,} kept", fontsize=10, color=INK, loc="left")
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
    first = figure.axes[0]
    first.set_yticks(layers, [str(i) for i in layers])
    first.set_ylabel("layer of the teacher", color=INK)
    first.invert_yaxis()
    hidden = metrics.get("plan_hidden")
    if hidden is not None:
        line = f"residual stream: {hidden['kept']:,} of {hidden['of']:,} channels kept"
        figure.suptitle(line, fontsize=10, color=INK, ha="left", x=0.01)
    return save(figure, path)


def _log(axes: Axes) -> None:
    """A logarithmic axis for y, with plain numbers, and a tick at 1, 2 and 5 of each power of ten."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.yaxis.set_minor_formatter(lambda *_: "")


def draw_losses(history: Mapping[str, Any]) -> Figure | None:
    """The losses of every training, one after the other, over the optimizer's steps.

    Args:
        history: by stage, `steps` and, by name, `losses` (as `distill_llm.pipeline.train_model.loss_history` makes them).

    Returns:
        None where nothing was logged.
    """
    trained = {stage: each for stage, each in history.items() if each["steps"]}
    if not trained:
        return None
    figure = new_figure(height=3.4)
    axes = bare(figure.subplots())
    names = list(dict.fromkeys(name for each in trained.values() for name in each["losses"]))
    terms = [name for name in names if name != "loss"]
    colours = {name: LIGHT[SERIES[place % len(SERIES)]] for place, name in enumerate(terms)} | {"loss": INK}
    values, begin, edges, shown = [], 0, [0], set()
    for each in trained.values():
        for name in sorted(each["losses"], key=lambda name: name == "loss"):
            points = [(begin + x, y) for x, y in zip(each["steps"], each["losses"][name], strict=True) if y is not None]
            values += [y for _, y in points]
            label = "_" if name in shown else plain("total" if name == "loss" else name.removeprefix("loss/"))
            shown.add(name)
            style: dict[str, Any] = {"linewidth": 2 if name == "loss" else 1.5, "marker": "o", "markersize": 2.2}
            axes.plot(*zip(*points, strict=True), color=colours[name], label=label, **style)
        begin += each["steps"][-1]
        edges.append(begin)
    if min(values) > 0 and max(values) > 8 * min(values):
        _log(axes)
    for edge in edges[1:-1]:
        axes.axvline(edge, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
    if len(trained) <= MOST_LABELS:
        top: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        for stage, (left, right) in zip(trained, pairwise(edges), strict=True):
            name = stage.removesuffix("/recover").replace("-", " ")
            axes.text((left + right) / 2, 1.01, plain(name), color=MUTED, fontsize=9.5, **top)
    axes.set_xlim(0, begin)
    axes.set_xlabel("optimizer steps", color=MUTED, fontsize=10)
    axes.grid(axis="y", color=EMPTY, linewidth=0.8)
    _legend(figure, 1.2)
    return figure


def draw_latency(grid: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Milliseconds of a batch over the length of its rows: a line for each batch size, teacher dashed and student solid.

    Args:
        grid: points as `distill_llm.measuring.grid.GridPoint` has them.

    Returns:
        None for fewer than two points.
    """
    if len(grid) < 2:
        return None
    figure = new_figure(height=3.4)
    axes = bare(figure.subplots())
    lengths = sorted({each["sequence_length"] for each in grid})
    for place, size in enumerate(sorted({each["batch_size"] for each in grid})):
        row = [each for each in grid if each["batch_size"] == size]
        xs, colour = [each["sequence_length"] for each in row], LIGHT[SERIES[place % len(SERIES)]]
        axes.plot(xs, [e["other_ms"] for e in row], color=colour, linestyle=(0, (4, 2)), marker="s", markersize=4)
        axes.plot(xs, [e["model_ms"] for e in row], color=colour, marker="o", markersize=5, label=f"batch of {size}")
    axes.plot([], [], color=MUTED, linestyle=(0, (4, 2)), marker="s", markersize=4, label="teacher")
    axes.plot([], [], color=MUTED, marker="o", markersize=5, label="student")
    axes.set_xscale("log")
    _log(axes)
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.xaxis.set_minor_formatter(lambda *_: "")
    axes.set_xlabel("tokens in each row", color=MUTED, fontsize=10)
    axes.set_ylabel("milliseconds for the batch", color=MUTED, fontsize=10)
    axes.grid(axis="y", color=EMPTY, linewidth=0.8)
    _legend(figure, 1.8)
    return figure


def _legend(figure: Figure, handles: float) -> None:
    """What the marks mean, above a figure; `handles`: the length of their samples, in letters."""
    style: dict[str, Any] = {"frameon": False, "labelcolor": INK, "fontsize": 10, "columnspacing": 1}
    figure.legend(loc="outside upper center", ncols=3, handlelength=handles, **style)
