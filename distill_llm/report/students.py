"""The part of a report on runs that trained several students: one after the other (generations), or together (peers)."""

from collections.abc import Mapping
from typing import Any

from distill_llm.metrics.errors import shown_score
from distill_llm.report.tables import MISSING, Cells, count, markdown_table


def students_heading(metrics: Mapping[str, Any]) -> str:
    """What the students are to each other; empty for a run with one."""
    return "Generations" if metrics.get("generations") else "Peers" if metrics.get("peers") else ""


def students_cells(metrics: Mapping[str, Any]) -> Cells:
    """A row for each student, and one for all generations together where they were scored so; empty for a run with one."""
    generations, peers = metrics.get("generations"), metrics.get("peers")
    if generations:
        return _of_generations(generations, metrics["metric"])
    if not peers:
        return Cells([], [])
    held_out = peers.get("by") is not None
    body = [[row["name"], count(row["params"]), *_scores(row["metrics"], held_out)] for row in peers["students"]]
    return Cells(["peer", "parameters", metrics["metric"], *_held(held_out)], body)


def _of_generations(found: Mapping[str, Any], metric: str) -> Cells:
    held_out, body = found.get("by") is not None, []
    for row in found["students"]:
        number = row["generation"]
        source = f"generation {row['learnt_from']}" if row["learnt_from"] else "the teacher"
        name = f"{number} (the student)" if number == found["chosen"] else str(number)
        body.append([name, source, *_scores(row["metrics"], held_out)])
    if found.get("ensemble"):
        body.append(["all together", MISSING, *_scores(found["ensemble"], held_out)])
    return Cells(["generation", "learnt from", metric, *_held(held_out)], body)


def _held(held_out: bool) -> list[str]:
    return ["held-out rows"] if held_out else []


def _scores(metrics: Mapping[str, Any], held_out: bool) -> list[str]:
    scores = [shown_score(metrics)]
    return [*scores, f"{metrics['validation']:.4f}"] if held_out else scores


def students_note(metrics: Mapping[str, Any]) -> str:
    """Which of the students is the best or was chosen, and how it is known; empty for a run with one."""
    generations, peers = metrics.get("generations"), metrics.get("peers")
    if generations:
        why = (
            "the best on held-out rows"
            if generations.get("by")
            else "the last, since no rows were held out to choose by"
        )
        return f"The student is generation {generations['chosen']}: {why}."
    if not peers:
        return ""
    if peers.get("best") is None:
        return "No rows were held out, so none of them is named the best."
    return f"The best on held-out rows: {peers['students'][peers['best']]['name']}."


def students_part(metrics: Mapping[str, Any]) -> list[str]:
    """Heading, table and note in Markdown; empty for a run with one student."""
    cells = students_cells(metrics)
    if not cells.body:
        return []
    return [f"## {students_heading(metrics)}", markdown_table(cells.head, cells.body).rstrip(), students_note(metrics)]
