"""GLUE's table: each task by the metrics that GLUE reports, their average, and what is missing."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill_llm.common.files import written_whole
from distill_llm.data.glue import GLUE, NAMES
from distill_llm.report.tables import MISSING, markdown_table

RECORD = "glue.json"
"""The file that the folder of a table is known by."""
SHORT = {
    "accuracy": "acc",
    "f1": "F1",
    "matthews_correlation": "Matthews",
    "pearsonr": "Pearson",
    "spearmanr": "Spearman",
}
REPORTED = {"cola": ("matthews_correlation",)}
"""Where GLUE does not report all metrics of a task."""


def glue_record(models: Sequence[str], results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The contents of glue.json.

    A task counts by the mean of its metrics (MNLI: of its two parts), and the average is the mean over tasks (Wang et al. 2018,
    section 5): GLUE's own over all nine. Papers often leave out WNLI.

    Args:
        models: what was asked for.
        results: by task its `metrics`, and MNLI's on the `mismatched` part.
    """
    tasks = {
        name: {**results[name], "score": _mean(list(_parts(name, results[name]).values()))}
        for name in GLUE
        if name in results
    }
    scores = {name: each["score"] for name, each in tasks.items()}
    without = [score for name, score in scores.items() if name != "wnli"]
    return {
        "models": list(models),
        "tasks": tasks,
        "average": _mean(list(scores.values())),
        "average_without_wnli": _mean(without) if without else None,
        "missing": [name for name in GLUE if name not in tasks],
    }


def write_glue(folder: Path, record: Mapping[str, Any]) -> None:
    """Write `glue.json` and `glue.md`."""
    texts = {
        RECORD: json.dumps(record, indent=2) + "\n",
        "glue.md": glue_table(record) + "\n" + average_line(record) + "\n",
    }
    for name, text in texts.items():
        with written_whole(folder / name) as file:
            file.write_text(text, encoding="utf-8")


def glue_table(record: Mapping[str, Any]) -> str:
    """The table in Markdown: a row per task, 100 times each metric. Tasks without a result have a dash."""
    body = []
    for name, title in NAMES.items():
        result = record["tasks"].get(name)
        if result is None:
            body.append([title, MISSING, MISSING, MISSING, MISSING])
            continue
        error = result["metrics"].get("standard_error")
        parts = _parts(name, result)
        rows = f"{result['metrics']['rows']:,}" + (
            f"/{result['mismatched']['rows']:,}" if "mismatched" in result else ""
        )
        body.append(
            [title, "/".join(parts), shown(name, result), MISSING if error is None else f"{100 * error:.1f}", rows]
        )
    return markdown_table(["task", "metrics", "score", "±", "rows"], body)


def shown(name: str, result: Mapping[str, Any]) -> str:
    """100 times the metrics of a task, as `84.6/83.4`."""
    return "/".join(f"{100 * value:.1f}" for value in _parts(name, result).values())


def average_line(record: Mapping[str, Any]) -> str:
    """The average, and honestly of what."""
    done, missing = len(record["tasks"]), [NAMES[name] for name in record["missing"]]
    mnli = record["tasks"].get("mnli")
    if mnli is not None and "mismatched" not in mnli:
        missing.append("MNLI's mismatched part")
    if not missing:
        both = f"GLUE average: {100 * record['average']:.1f}; without WNLI: {100 * record['average_without_wnli']:.1f}."
        return f"{both} On the development sets."
    line = f"Average of {done} of the 9 tasks: {100 * record['average']:.1f}. This is not GLUE's average: {', '.join(missing)}"
    return f"{line} {'is' if len(missing) == 1 else 'are'} missing. On the development sets."


def _parts(name: str, result: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that GLUE reports of a task, by their short names."""
    if name == "mnli":
        parts = {"m": result["metrics"]["accuracy"]}
        return parts | ({"mm": result["mismatched"]["accuracy"]} if "mismatched" in result else {})
    return {SHORT[metric]: result["metrics"][metric] for metric in REPORTED.get(name, GLUE[name].metrics)}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
