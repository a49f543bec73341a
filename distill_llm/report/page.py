"""report.html of a run: one file that needs no network and no scripts, for a phone and for a desk, in light and dark."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from distill_llm.common.durations import duration
from distill_llm.common.files import written_whole
from distill_llm.report import tables
from distill_llm.report.card import shown_recipe
from distill_llm.report.drawing import inline
from distill_llm.report.exits import draw_exits, exits_cells, exits_note, exits_shown, exits_summary
from distill_llm.report.figures import draw_latency, draw_losses, draw_scores
from distill_llm.report.origins import shown_name
from distill_llm.report.palette import DARK, LIGHT
from distill_llm.report.report import HARNESS, headline, members_words, notes, round_notes, rows_note, summary
from distill_llm.report.search_figure import draw_search
from distill_llm.report.students import students_cells, students_heading, students_note
from distill_llm.report.tables import MISSING, Cells, count, megabytes, milliseconds, percent
from distill_llm.report.usage import loading, snippet

MOST_SQUARES = 32
"""Heads of a layer that are drawn one by one."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""Characters that HTML does not allow."""
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def two_lines(cell: str) -> Markup:
    """A cell of a table: what stands behind its number (`± 0.01`, `(50%)`) is an element, for a narrow page to put below it."""
    number, more = re.fullmatch(r"(.*?)(?: ([±(].*))?", cell, re.DOTALL).groups()  # type: ignore[union-attr]
    return Markup('{} <span class="more">{}</span>').format(number, more) if more else escape(number)


TEMPLATES.filters["two_lines"] = two_lines


@dataclass(frozen=True)
class Tile:
    """A number of the headline: its name, the number, and what it is compared with."""

    name: str
    value: str
    detail: str


def write_page(
    run_dir: str | Path, metrics: Mapping[str, Any], disagreements: Mapping[str, Any], recipe_yaml: str
) -> Path:
    """Write `report.html` into a run's folder.

    Args:
        run_dir: the folder of the run, with the finished model in `student/`.
        metrics: what `metrics.json` holds. Parts that earlier versions did not write may be missing.
        disagreements: what `disagreements.json` holds; empty where no rows are to be shown.
        recipe_yaml: the resolved recipe. Of local paths the page shows only the last parts.

    Returns:
        The path of report.html.

    Raises:
        InputError: the run has no `student/config.json`.
    """
    run_dir, (columns, layers) = Path(run_dir), heat_map(metrics)
    text = TEMPLATES.get_template("report.html.jinja").render(
        light=LIGHT,
        dark=DARK,
        metrics=metrics,
        title=headline(metrics),
        summary=summary(metrics),
        warnings=metrics.get("warnings") or [],
        tiles=tiles(metrics),
        notes=" ".join(filter(None, [notes(metrics), rows_note(metrics)])),
        results=tables.results_cells(metrics),
        columns=columns,
        layers=layers,
        rounds=tables.rounds_cells(metrics),
        bits=tables.bits_cells(metrics),
        bits_note=tables.bits_note(metrics),
        benchmarks=tables.harness_cells(metrics),
        benchmarks_note=HARNESS,
        round_notes=round_notes(metrics),
        students=students_cells(metrics),
        students_heading=students_heading(metrics),
        students_note=students_note(metrics),
        charts=charts(metrics),
        grid=grid_cells(metrics),
        exits=exits_cells(metrics),
        exits_notes=[each for each in (exits_summary(metrics), exits_note(metrics)) if each],
        disagreements=disagreements,
        snippet=snippet(run_dir / "student", "student"),
        loading=loading(run_dir / "student").partition(": ")[2],
        facts=facts(metrics),
        stages=stages(metrics),
        recipe=shown_recipe(recipe_yaml),
        percent=percent,
    )
    path = run_dir / "report.html"
    with written_whole(path) as file:
        file.write_bytes(CONTROL.sub("", text).encode("utf-8", "replace"))
    return path


def tiles(metrics: Mapping[str, Any]) -> list[Tile]:
    """Score, size, speed and memory, each beside the teacher's."""
    teacher, student = metrics["teacher"], metrics["student"]
    score = f"{metrics['metric']}; the teacher has {teacher['score']:.4g}"
    if metrics.get("higher_is_better", True) and metrics.get("retention") is not None:
        score = f"{metrics['metric']}: {percent(metrics['retention'])} of the teacher's {teacher['score']:.4g}"
    found = [Tile("Score", f"{student['score']:.4g}", score)]
    share = student["params"] / teacher["params"]
    found.append(Tile("Size", percent(share), f"{count(student['params'])} of {count(teacher['params'])} parameters"))
    if metrics.get("speedup") is not None:
        times = (milliseconds(each["latency_ms"]) for each in (student, teacher))
        found.append(Tile("Speed", f"{metrics['speedup']:.2f}×", "{} a batch instead of {}".format(*times)))
    if teacher.get("peak_memory_mb") and student.get("peak_memory_mb"):
        held = (megabytes(each["peak_memory_mb"]) for each in (student, teacher))
        share = student["peak_memory_mb"] / teacher["peak_memory_mb"]
        found.append(Tile("Memory", percent(share), "{} at peak instead of {}".format(*held)))
    return found


def charts(metrics: Mapping[str, Any]) -> dict[str, Markup | None]:
    """The pictures; None where there are no data for one."""
    drawn = {
        "scores": (draw_scores(metrics), f"{metrics['metric']} after every stage, over the size of the model"),
        "losses": (draw_losses(metrics.get("history") or {}), "losses over the steps of every training"),
        "exits": (draw_exits(metrics), exits_shown(metrics)),
        "search": (draw_search(metrics), "fitness by generation of the search for the plan"),
        "latency": (draw_latency(metrics.get("latency_grid") or []), "latency over batch size and length"),
    }
    return {name: None if figure is None else inline(figure, label) for name, (figure, label) in drawn.items()}


@dataclass(frozen=True)
class Kept:
    """A cell of the heat map: what is kept of a kind of unit, in a layer or in all.

    Attributes:
        unit: the kind.
        name: in words.
        kept, of: how many units stay, and how many there were.
        squares: of few units, whether each one is kept; else empty.
    """

    unit: str
    name: str
    kept: int
    of: int
    squares: list[bool]

    @property
    def share(self) -> float:
        """What is kept, from 0 to 1."""
        return self.kept / self.of if self.of else 1.0

    @property
    def block(self) -> str:
        """What is gone where nothing is kept."""
        return "FFN" if self.unit == "neurons" else "attention"


def heat_map(metrics: Mapping[str, Any]) -> tuple[list[Kept], list[dict[str, Any]]]:
    """The sums of all layers by kind of unit, and the `number` and the `cells` of every layer of the teacher.

    A layer without cells was removed. Both are empty for a run without a plan.
    """
    kept = {layer["source"]: layer for layer in metrics.get("plan_layers") or []}
    if not kept:
        return [], []
    any_layer = next(iter(kept.values()))
    grouped = "queries" in any_layer
    names = {"heads": "key-value groups" if grouped else "heads", "queries": "query heads", "neurons": "FFN neurons"}
    units = [unit for unit in names if unit in any_layer]
    rows, sums = [], dict.fromkeys(units, (0, 0))
    for number in range(max(metrics["teacher"].get("layers") or 0, max(kept) + 1)):
        layer, cells = kept.get(number), []
        for unit in units:
            of, left = (layer or any_layer)[f"{unit}_of"], layer[unit] if layer else 0
            sums[unit] = (sums[unit][0] + left, sums[unit][1] + of)
            places = layer.get(f"{unit}_kept") if layer else None
            squares = [i in places for i in range(of)] if places is not None and of <= MOST_SQUARES else []
            cells.append(Kept(unit, names[unit], left, of, squares))
        rows.append({"number": number, "cells": cells if layer else []})
    return [Kept(unit, names[unit], *sums[unit], []) for unit in units], rows


def grid_cells(metrics: Mapping[str, Any]) -> Cells:
    """The speed-up and both latencies of every batch that was timed: a row for each length."""
    grid: Sequence[Mapping[str, Any]] = metrics.get("latency_grid") or []
    if len(grid) < 2:
        return Cells([], [])
    points = {(each["sequence_length"], each["batch_size"]): each for each in grid}
    lengths, sizes = (sorted({key[place] for key in points}) for place in (0, 1))

    def shown(point: Mapping[str, Any] | None) -> str:
        if point is None:
            return MISSING
        times = (point["other_ms"], point["model_ms"])
        before, after = (f"{each:.0f}" if each >= 100 else f"{each:.3g}" for each in times)
        return f"{point['speedup']:.2f}× ({before} → {after})"

    body = [[f"{length} tokens", *(shown(points.get((length, size))) for size in sizes)] for length in lengths]
    return Cells(["", *(f"batch of {size}" for size in sizes)], body)


def facts(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was run, as names and values; what is unknown is left out."""
    versions = ", ".join(f"{name} {version}" for name, version in (metrics.get("versions") or {}).items())
    seconds, seed = metrics.get("seconds"), metrics.get("seed")
    ensemble, served = metrics.get("ensemble"), metrics.get("served")
    others = shown_name(served["model"]) if served else members_words(ensemble, shown_name) if ensemble else None
    found = [
        ("Teacher", shown_name(str(metrics["teacher_model"]))),
        ("Learnt from", others),
        ("Task", str(metrics["task"])),
        ("Device", str(metrics["device"])),
        ("Seed", None if seed is None else str(seed)),
        ("Versions", versions or None),
        ("Time", None if seconds is None else duration(seconds)),
    ]
    return [(name, value) for name, value in found if value is not None]


def stages(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages with their time, and its share of that of the longest."""
    found = metrics.get("stages") or {}
    longest = max(found.values(), default=0) or 1
    return [{"name": name, "time": duration(seconds), "share": seconds / longest} for name, seconds in found.items()]
