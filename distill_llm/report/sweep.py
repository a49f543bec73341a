"""The report of a sweep: what each cell costs and gains, as JSON, as a table and as a page with the trade-off curves."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from distill_llm.common.files import written_whole
from distill_llm.metrics.errors import shown_score
from distill_llm.report.curves import sweep_notes, sweep_page
from distill_llm.report.report import short_name
from distill_llm.report.tables import (
    MISSING,
    Cells,
    count,
    markdown_table,
    megabytes,
    milliseconds,
    percent,
    speedup,
)

RECORD = "sweep.json"
"""The file that a sweep's folder is known by."""
SHARED = ("task", "metric", "higher_is_better", "device", "teacher_model", "latency", "baselines", "versions")
"""Parts of metrics.json that all cells have in common, if no field of theirs was varied."""
OWN = ("student", "retention", "params_kept", "layer_params_kept", "speedup", "speedup_min", "speedup_max", "seconds")
"""Parts of metrics.json that belong to a cell."""

Entry = tuple[str, Mapping[str, Any], Mapping[str, Any] | None, str | None]
"""A cell: its name, its values, its metrics, and why it has none."""


def record_of(cells: Sequence[Entry]) -> dict[str, Any]:
    """The contents of sweep.json: what all runs share, the teacher as the first run measured it, and the cells in order."""
    first = next((metrics for _, _, metrics, _ in cells if metrics is not None), {})
    rows = []
    for name, values, metrics, error in cells:
        own = {part: metrics[part] for part in OWN} if metrics is not None else {}
        own |= {"teacher_score": metrics["teacher"]["score"]} if metrics is not None else {}
        rows.append({"name": name, "values": dict(values), **own, **({"error": error} if error else {})})
    shared = {part: first[part] for part in (*SHARED, "teacher") if part in first}
    return {**shared, "cells": rows}


def write_sweep(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `sweep.json`, `sweep.md` and `sweep.html` into the folder of a sweep."""
    texts = {RECORD: json.dumps(record, indent=2) + "\n"}
    if "teacher" in record:
        texts["sweep.md"] = _markdown(record)
        texts["sweep.html"] = sweep_page(record, title(record), Cells(*_cells(record)))
    for name, text in texts.items():
        with written_whole(folder / name) as file:
            file.write_text(text, encoding="utf-8")


def sweep_table(record: Mapping[str, Any]) -> Table:
    """The table of a sweep, for a terminal."""
    head, rows = _cells(record)
    table = Table()
    for name in head:
        table.add_column(name, justify="left" if name == head[0] else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _markdown(record: Mapping[str, Any]) -> str:
    head, rows = _cells(record)
    failed = [f"`{cell['name']}` has no student: {cell['error']}." for cell in record["cells"] if "error" in cell]
    return "\n\n".join([f"# {title(record)}", markdown_table(head, rows).rstrip(), sweep_notes(record), *failed]) + "\n"


def title(record: Mapping[str, Any]) -> str:
    """What was swept."""
    return f"{short_name(record)} on {record['task']}: {len(record['cells'])} students"


def _cells(record: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The table's head; and its rows: the teacher, and one per cell."""
    arrow = "" if record["higher_is_better"] else " (lower is better)"
    head = [
        "student",
        f"{record['metric']}{arrow}",
        "retention",
        "parameters",
        "of the layers",
        "latency",
        "speed-up",
        "peak memory",
    ]
    rows = [_row(cell["name"], cell.get("student"), cell) for cell in record["cells"]]
    return head, [_row("teacher", record["teacher"], {}), *rows]


def _row(name: str, side: Mapping[str, Any] | None, cell: Mapping[str, Any]) -> list[str]:
    if side is None:
        return [name, "failed" if "error" in cell else "to do", *[MISSING] * 6]
    return [
        name,
        shown_score(side),
        percent(cell.get("retention", 1)),
        count(side["params"]),
        percent(cell.get("layer_params_kept", 1)),
        _shown(side.get("latency_ms"), milliseconds),
        speedup(cell) if cell.get("speedup") is not None else "1.00x" if not cell else MISSING,
        _shown(side.get("peak_memory_mb"), megabytes),
    ]


def _shown(value: float | None, show: Any) -> str:
    return MISSING if value is None else show(value)
