"""The two figures of a run: the score over the rounds, and how many units every layer keeps."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from distill_llm.common.files import written_whole

INK, MUTED, EMPTY = "#2b2d33", "#8a8f98", "#e4e6ea"
STAGES = {
    "pruned": ("#c8553d", "v"),
    "compensated": ("#e0a030", "D"),
    "recovered": ("#1f7a8c", "o"),
}
UNITS = {"heads": "#1f7a8c", "queries": "#e0a030", "neurons": "#c8553d"}


def score_figure(metrics: Mapping[str, Any], path: Path) -> Path | None:
    """Draw the score after every stage of every round, and the teacher's as a line; save it as PNG at `path`.

    For a run without rounds, draws nothing and returns None.
    """
    rounds = metrics.get("rounds") or []
    if not rounds:
        return None
    points = [
        (number + (place - 1) * 0.24, each[f"score_{stage}"], stage)
        for number, each in enumerate(rounds)
        for place, stage in enumerate(STAGES)
        if each.get(f"score_{stage}") is not None
    ]
    figure = _figure(width=min(12, max(5.6, 2.2 + 1.5 * len(rounds))), height=3.6)
    axes = _bare(figure.subplots())
    teacher = metrics["teacher"]["score"]
    axes.axhline(teacher, color=INK, linewidth=1.2, linestyle=(0, (5, 3)), label=f"teacher ({teacher:.4f})", zorder=1)
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=EMPTY, linewidth=2, zorder=1)
    for stage, (colour, marker) in STAGES.items():
        mine = [(x, y) for x, y, name in points if name == stage]
        if mine:
            axes.scatter(
                [x for x, _ in mine],
                [y for _, y in mine],
                color=colour,
                marker=marker,
                s=52,
                label=stage,
                zorder=3,
                edgecolor="white",
            )
    crowded = len(rounds) > 6
    for x, y, stage in points:
        if not crowded or stage == points[-1][2]:
            _label(axes, f"{y:.3f}", x, y)
    axes.set_xticks(range(len(rounds)), [_round_label(n, each) for n, each in enumerate(rounds, 1)])
    if rounds[0].get("layer_params_kept") is not None:
        axes.set_xlabel("share of the layers' parameters kept", color=MUTED, fontsize=9)
    axes.set_xlim(-0.6, len(rounds) - 0.4)
    scores = [teacher, *(y for _, y, _ in points)]
    room = max(max(scores) - min(scores), 0.005)
    axes.set_ylim(min(scores) - 0.3 * room, max(scores) + 0.15 * room)
    arrow = "" if metrics.get("higher_is_better", True) else ", lower is better"
    axes.set_ylabel(f"{metrics['task']}: {metrics['metric']}{arrow}", color=INK)
    axes.grid(axis="y", color=EMPTY, linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9, handletextpad=0.4)
    return _save(figure, path)


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
    figure = _figure(width=4 * len(units), height=max(2.4, 1.2 + 0.3 * len(layers)))
    for axes, unit in zip(figure.subplots(1, len(units), sharey=True), units, strict=True):
        _bare(axes)
        whole = [kept.get(i, any_layer)[f"{unit}_of"] for i in layers]
        left = [kept[i][unit] if i in kept else 0 for i in layers]
        axes.barh(layers, whole, color=EMPTY, height=0.72)
        axes.barh(layers, left, color=UNITS[unit], height=0.72)
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
    return _save(figure, path)


def _round_label(number: int, each: Mapping[str, Any]) -> str:
    kept = each.get("layer_params_kept")
    return f"round {number}" + ("" if kept is None else f"\n{100 * kept:.0f}%")


def _label(axes: Axes, text: str, x: float, y: float) -> None:
    behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    style: dict[str, Any] = {"ha": "center", "va": "top", "fontsize": 8, "color": INK, "bbox": behind, "zorder": 2}
    axes.annotate(text, (x, y), (0, -9), textcoords="offset points", **style)


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=160, layout="constrained", facecolor="white")


def _bare(axes: Axes) -> Axes:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.tick_params(length=0, labelcolor=INK, labelsize=9)
    axes.set_axisbelow(True)
    return axes


def _save(figure: Figure, path: Path) -> Path:
    with written_whole(path) as file:
        figure.savefig(file, format="png")
    return path
