"""The tables of a report in Markdown, made from what `metrics.json` holds."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill_llm.common.durations import duration
from distill_llm.metrics.errors import shown_score

MISSING = "–"


def retention(score: float, teacher_score: float, higher_is_better: bool = True) -> float | None:
    """How much of the teacher's score a student keeps: student / teacher, or teacher / student where lower is better.

    None if the divisor is not above zero: the ratio would mean nothing.
    """
    part, whole = (score, teacher_score) if higher_is_better else (teacher_score, score)
    return part / whole if whole > 0 else None


@dataclass(frozen=True)
class Column:
    """One model of the results table: its heading, its score as number and as text, and its costs (as `metrics["student"]`)."""

    name: str
    score: float
    shown: str
    costs: Mapping[str, Any]


def columns(metrics: Mapping[str, Any]) -> list[Column]:
    """The models of a run in order: the teacher, then the student as pruned, compensated and recovered, as far as these exist.

    The pruned and the compensated model are those of the last round. They have the same layers as the final student, and so the
    same costs. A student that was never pruned has one column, `student`. The quantized one comes last, with its own costs.
    """
    told, rounds, teacher = metrics.get("quantization"), metrics.get("rounds") or [], metrics["teacher"]
    student = told["before"] if told else metrics["student"]
    found = [Column("teacher", teacher["score"], shown_score(teacher), teacher)]
    found += _of_rounds(rounds, student)
    if not told:
        return found
    last = metrics["student"]
    return [*found, Column("quantized", last["score"], shown_score(last), last)]


def _of_rounds(rounds: Sequence[Mapping[str, Any]], student: Mapping[str, Any]) -> list[Column]:
    recovered = Column("recovered" if rounds else "student", student["score"], shown_score(student), student)
    if not rounds:
        return [recovered]
    found = []
    last = rounds[-1]
    for stage in ("pruned", "compensated"):
        if last.get(f"score_{stage}") is not None:
            found.append(Column(stage, last[f"score_{stage}"], _stage_score(last, stage), student))
    return [*found, recovered] if last.get("score_recovered") is not None else found


def _stage_score(row: Mapping[str, Any], stage: str) -> str:
    """The score after a stage of a round, with its standard error; a dash where the round has no such stage."""
    score = row.get(f"score_{stage}")
    return MISSING if score is None else shown_score(row.get(stage) or {}, score)


@dataclass(frozen=True)
class Cells:
    """A table: its headings, and the cells of every row, the first of which names the row."""

    head: list[str]
    body: list[list[str]]


def results_table(metrics: Mapping[str, Any]) -> str:
    """The cells of `results_cells` in Markdown."""
    cells = results_cells(metrics)
    return markdown_table(cells.head, cells.body)


def results_cells(metrics: Mapping[str, Any]) -> Cells:
    """teacher | pruned | compensated | recovered: score, retention, sizes, FLOPs, memory, latency, speed-up."""
    models, teacher = columns(metrics), metrics["teacher"]
    higher = metrics.get("higher_is_better", True)
    arrow = "" if higher else " (lower is better)"
    body = [
        [f"{metrics['metric']}{arrow}", *(m.shown for m in models)],
        ["retention", *(percent(retention(m.score, teacher["score"], higher)) for m in models)],
    ]
    for key, label, show in (
        ("params", "parameters", count),
        ("layer_params", "parameters of the layers", count),
        ("flops", "FLOPs of a batch", flops),
        ("weights_mb", "memory of the weights", megabytes),
        ("peak_memory_mb", "peak memory", megabytes),
        ("latency_ms", "latency of a batch", milliseconds),
    ):
        if teacher.get(key) is not None:
            body.append([label, *(_with_share(m.costs.get(key), teacher[key], show, m.name) for m in models)])
    if sparsity := metrics.get("sparsity"):
        zero, (whole, left) = percent(sparsity["share"]), (sparsity["compressed_mb"][k] for k in ("teacher", "student"))
        body.append(["zero weights of the linears", MISSING, *[zero] * (len(models) - 1)])
        body.append(
            [
                "weights after zlib",
                *(_with_share(whole if m is models[0] else left, whole, megabytes, m.name) for m in models),
            ]
        )
    if metrics.get("speedup") is not None:
        own = [
            MISSING if metrics.get("quantization") and m.name != "quantized" else speedup(metrics) for m in models[1:]
        ]
        body.append(["measured speed-up", "1.00x", *own])
    return Cells(["", *(m.name for m in models)], body)


def rounds_table(metrics: Mapping[str, Any]) -> str:
    """The cells of `rounds_cells` in Markdown; empty without rounds."""
    cells = rounds_cells(metrics)
    return markdown_table(cells.head, cells.body) if cells.body else ""


def rounds_cells(metrics: Mapping[str, Any]) -> Cells:
    """A row per round: target, share kept, the three scores, the time of each stage."""
    rounds = metrics.get("rounds") or []
    stages = [
        stage
        for stage in ("pruned", "compensated", "recovered")
        if any(r.get(f"score_{stage}") is not None for r in rounds)
    ]
    body = []
    for number, each in enumerate(rounds, 1):
        seconds = ", ".join(f"{stage} {duration(value)}" for stage, value in (each.get("seconds") or {}).items())
        shown = [_stage_score(each, stage) for stage in stages]
        kept = [percent(each.get("keep")), percent(each.get("layer_params_kept"))]
        body.append([str(number), *kept, *shown, seconds or MISSING])
    return Cells(["round", "target", "layer parameters kept", *stages, "time"], body)


def bits_table(metrics: Mapping[str, Any]) -> str:
    """The cells of `bits_cells` in Markdown; empty where the student was not quantized."""
    cells = bits_cells(metrics)
    return markdown_table(cells.head, cells.body) if cells.body else ""


def bits_cells(metrics: Mapping[str, Any]) -> Cells:
    """The student before and after quantization: score, files, memory, latency."""
    told = metrics.get("quantization")
    if not told:
        return Cells([], [])
    sides = (told["before"], told["after"])
    body = [[metrics["metric"], *(shown_score(each) for each in sides)]]
    for key, label, show in (
        ("file_mb", "weights on disk", megabytes),
        ("weights_mb", "memory of the weights", megabytes),
        ("peak_memory_mb", "peak memory", megabytes),
        ("latency_ms", "latency of a batch", milliseconds),
    ):
        first = sides[0][key]
        body.append([label, show(first), _with_share(sides[1][key], first, show, "")])
    body.append(["measured speed-up", "1.00x", speedup(told)])
    return Cells(["", "before", "quantized"], body)


def bits_note(metrics: Mapping[str, Any]) -> str:
    """How the student was quantized; empty where it was not."""
    told = metrics.get("quantization")
    if not told:
        return ""
    learnt = " The student learnt from its teacher as if rounded already." if told["trained"] else ""
    return f"{told['scheme'][0].upper()}{told['scheme'][1:]}; embeddings and heads keep their precision.{learnt}"


def harness_table(metrics: Mapping[str, Any]) -> str:
    """The cells of `harness_cells` in Markdown; empty without benchmarks."""
    cells = harness_cells(metrics)
    return markdown_table(cells.head, cells.body) if cells.body else ""


def harness_cells(metrics: Mapping[str, Any]) -> Cells:
    """A row per metric of every benchmark: teacher and student."""
    rows = metrics.get("harness") or []
    body = []
    for row in rows:
        teacher, student = (row[side]["score"] for side in ("teacher", "student"))
        kept = (
            percent(retention(student, teacher, row["higher_is_better"]))
            if row["higher_is_better"] is not None
            else MISSING
        )
        arrow = " (lower is better)" if row["higher_is_better"] is False else ""
        shown = [shown_score(row[side]) for side in ("teacher", "student")]
        shots = MISSING if row["shots"] is None else str(row["shots"])
        body.append([row["task"], f"{row['metric']}{arrow}", f"{row['rows']:,}", shots, *shown, kept])
    return Cells(["benchmark", "metric", "rows", "shots", "teacher", "student", "retention"], body)


def score_note(metrics: Mapping[str, Any]) -> str:
    """How many rows were scored, what ± means, and what needs no model to reach; empty if unknown."""
    rows, naive = metrics["student"].get("rows"), metrics.get("baselines") or {}
    if rows is None:
        return ""
    error = metrics["student"].get("standard_error")
    note = f"Scored on {rows:,} rows{'' if error is None else '; ± is one standard error'}."
    shown = ", ".join(f"{name} {score:.4f}" for name, score in naive.items())
    return f"{note} For comparison: {shown}." if shown else note


def latency_note(metrics: Mapping[str, Any]) -> str:
    """The device, the batch that was timed, and how the speed-up was measured."""
    size = metrics.get("latency") or {}
    batch = f" on batches of {size['batch_size']} x {size['sequence_length']} tokens" if size else ""
    paired = " Speed-up: teacher and student were timed in turn; median of the ratios (smallest–largest)."
    return f"Measured on {metrics['device']}{batch}.{paired if metrics.get('speedup') is not None else ''}"


def dtype_note(metrics: Mapping[str, Any]) -> str:
    """One sentence with the dtypes in which teacher and student were scored and measured; empty if unknown."""
    teacher, student = (metrics[side].get("dtype") for side in ("teacher", "student"))
    if teacher is None or student is None:
        return ""
    held = student if student == teacher else f"{teacher} (teacher) and {student} (student)"
    return f"Models were scored and measured with weights in {held}."


def markdown_table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """A GitHub table with aligned source; all columns but the first are right-aligned."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in (head, *body)]
    widths = [max(3, *(len(row[i]) for row in rows)) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (lines[0], rule, *lines[1:])) + "\n"


def percent(share: float | None) -> str:
    """`0.4975` as `49.8%`."""
    return MISSING if share is None else f"{100 * share:.1f}%"


def count(number: float) -> str:
    """A number of parameters, as `22.7 M`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:.0f}"


def flops(number: float) -> str:
    """FLOPs as `1.21 G`."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def megabytes(number: float) -> str:
    """Memory, given in MB."""
    return f"{number:.1f} MB" if number < 1000 else f"{number / 1000:.2f} GB"


def milliseconds(number: float) -> str:
    """A latency, given in milliseconds."""
    return f"{number:.1f} ms"


def speedup(metrics: Mapping[str, Any]) -> str:
    """The measured speed-up with its smallest and largest ratio, as `1.92x (1.85–1.99)`."""
    low, high = metrics.get("speedup_min"), metrics.get("speedup_max")
    spread = "" if low is None or high is None else f" ({low:.2f}–{high:.2f})"
    return f"{metrics['speedup']:.2f}x{spread}"


def _with_share(value: float | None, whole: float, show: Any, name: str) -> str:
    if value is None:
        return MISSING
    return show(value) if name == "teacher" or not whole else f"{show(value)} ({100 * value / whole:.0f}%)"
