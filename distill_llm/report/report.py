"""report.md of a run: the result as a table, the figures, and how to load the student."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill_llm.common.durations import duration
from distill_llm.common.files import written_whole
from distill_llm.data.alignment import alignment_words
from distill_llm.pruning.cutting.strength import described
from distill_llm.report.exits import exits_figure, exits_note, exits_shown, exits_summary, exits_table
from distill_llm.report.figures import kept_figure, score_figure
from distill_llm.report.learned import masks_words
from distill_llm.report.search_figure import search_figure
from distill_llm.report.students import students_part
from distill_llm.report.tables import (
    bits_note,
    bits_table,
    columns,
    count,
    dtype_note,
    harness_table,
    latency_note,
    percent,
    results_table,
    rounds_table,
    score_note,
)
from distill_llm.report.usage import snippet

HARNESS = "Scored by lm-evaluation-harness; ± is one standard error."


def write_report(run_dir: str | Path, metrics: Mapping[str, Any]) -> Path:
    """Write `report.md` and `figures/*.png` into a run's folder.

    Args:
        run_dir: the folder of the run, with the finished model in `student/`.
        metrics: what `metrics.json` holds.

    Returns:
        The path of report.md.

    Raises:
        InputError: the run has no `student/config.json`.
    """
    run_dir = Path(run_dir)
    usage = snippet(run_dir / "student", "student")
    figures = run_dir / "figures"
    scores = score_figure(metrics, figures / "scores.png")
    kept = kept_figure(metrics, figures / "kept.png")
    exits = exits_figure(metrics, figures / "exits.png")
    searched = search_figure(metrics, figures / "search.png")
    warnings = [f"> **Warning:** {warning}" for warning in metrics.get("warnings") or []]
    parts = [
        f"# {headline(metrics)}",
        *warnings,
        summary(metrics),
        results_table(metrics).rstrip(),
        notes(metrics),
        teachers_note(metrics),
        rows_note(metrics),
    ]
    if metrics.get("quantization"):
        parts += ["## Fewer bits", bits_table(metrics).rstrip(), bits_note(metrics)]
    if exits:
        parts += ["## Early exits", exits_summary(metrics), exits_table(metrics).rstrip(), exits_note(metrics)]
        parts.append(f"![{exits_shown(metrics)}](figures/exits.png)")
    if metrics.get("harness"):
        parts += ["## Benchmarks", harness_table(metrics).rstrip(), HARNESS]
    if metrics.get("rounds"):
        parts += ["## Rounds", rounds_table(metrics).rstrip()]
        parts += round_notes(metrics)
    parts += students_part(metrics)
    if scores:
        parts.append("![Score after every stage of every round](figures/scores.png)")
    if searched:
        parts += ["## Search for the plan", "![Fitness of the plans by generation](figures/search.png)"]
    if kept:
        parts += ["## What is kept in each layer", "![Kept heads and neurons of each layer](figures/kept.png)"]
    parts += ["## Load the student", f"From this folder:\n\n```python\n{usage}```", provenance(metrics)]
    path = run_dir / "report.md"
    with written_whole(path) as file:
        file.write_text("\n\n".join(part for part in parts if part) + "\n")
    return path


def round_notes(metrics: Mapping[str, Any]) -> list[str]:
    """What the rounds did that their rows in the table do not say."""
    rounds = metrics.get("rounds") or []
    said = [
        f"Round {n}: {described(record)}."
        for n, row in enumerate(rounds, 1)
        for record in row.get("compensation") or []
    ]
    said += [f"Round {n}: {masks_words(row['masks'])}." for n, row in enumerate(rounds, 1) if row.get("masks")]
    return said + [f"{row['note'][0].upper()}{row['note'][1:]}." for row in rounds if row.get("note")]


def short_name(metrics: Mapping[str, Any]) -> str:
    """The teacher's name without owner or folders. A teacher from a Python package goes by the package's name."""
    scheme, _, rest = str(metrics["teacher_model"]).rpartition("://")
    parts = rest.rstrip("/").split("/")
    return parts[0] if scheme == "package" else parts[-1]


def headline(metrics: Mapping[str, Any]) -> str:
    """The title: the teacher, what was done to it, and the task."""
    trained = {"teacher": "distilled", "labels": "fine-tuned"}.get(metrics.get("learned_from") or "")
    verbs = ("pruned" if metrics.get("rounds") else None, trained, "quantized" if metrics.get("quantization") else None)
    done = " and ".join(verb for verb in verbs if verb)
    return f"{short_name(metrics)}, {done} on {metrics['task']}"


def summary(metrics: Mapping[str, Any]) -> str:
    """The result in one or two sentences."""
    student, parts = metrics["student"], []
    if not metrics.get("higher_is_better", True):
        scores = [f"{metrics[side]['score']:.4g}" for side in ("student", "teacher")]
        parts.append(f"has a {metrics['metric']} of {scores[0]} (teacher: {scores[1]})")
    elif metrics.get("retention") is not None:
        parts.append(f"keeps {percent(metrics['retention'])} of its teacher's {metrics['metric']}")
    if metrics.get("layer_params_kept") is not None:
        parts.append(f"has {percent(metrics['layer_params_kept'])} of the parameters of its teacher's layers")
    if metrics.get("speedup") is not None:
        parts.append(f"runs {metrics['speedup']:.2f} times as fast")
    joined = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""
    return f"The student ({count(student['params'])} parameters) {joined}." if joined else ""


def notes(metrics: Mapping[str, Any]) -> str:
    """What was measured, and how to read the results table."""
    lines = [score_note(metrics), latency_note(metrics), dtype_note(metrics), sparsity_note(metrics)]
    shared = [each for each in columns(metrics)[1:] if each.name != "quantized"]
    if len(shared) > 1:
        last = " of the last round" if len(metrics["rounds"]) > 1 else ""
        before = ", before quantization," if metrics.get("quantization") else ""
        lines.append(
            f"The columns after the teacher{before} share one architecture{last}, so its costs were measured once."
        )
    if metrics.get("aligned"):
        lines.append(
            "Teacher and student have tokenizers of their own: the teacher's perplexity is counted per token of the student;"
            f" {alignment_words(metrics['aligned'])}."
        )
    return " ".join(line for line in lines if line)


def sparsity_note(metrics: Mapping[str, Any]) -> str:
    """What the zeros of a sparse student bring and what not; empty for a dense one."""
    sparsity = metrics.get("sparsity")
    if not sparsity:
        return ""
    faster = "some GPUs, with kernels made for them, " if sparsity["pattern"] == "2:4" else "nothing that is used here "
    return (
        f"{sparsity['zeros']:,} of {sparsity['weights']:,} weights of the layers' linears are zero"
        f" ({sparsity['pattern']}, {sparsity['criterion']}). {faster[0].upper()}{faster[1:]}computes faster with such zeros:"
        " they were computed with like any others. They save room where files are compressed."
    )


def taught_words(metrics: Mapping[str, Any], shown: Callable[[str], str] = str) -> str:
    """What taught in the place of the teacher, or with it, in words; empty where it taught alone.

    Args:
        shown: how a model is named.
    """
    if (served := metrics.get("served")) is not None:
        return f"learnt from `{shown(served['model'])}`, which was served, by its {served['k']} likeliest tokens"
    if (average := metrics.get("moving_average")) is not None:
        saved = ", which was saved in its place" if average["as_student"] else ""
        return f"learnt from the moving average of its own weights (decay {average['decay']:g}){saved}"
    if (peers := metrics.get("learnt_with")) is not None:
        number = peers["peers"]
        mean = "" if number == 1 else f", each from the mean of the others' {peers['average']}"
        return f"learnt together with {number} peer{'s' * (number > 1)}{mean}"
    if (stages := metrics.get("teacher_stages")) is not None:
        return f"learnt from {stages} checkpoints of the teacher, one after the other"
    ensemble, assistant = metrics.get("ensemble"), metrics.get("assistant")
    later = ""
    if assistant is not None:
        share = "alone" if assistant["share"] == 1 else f"with a share of {assistant['share']:.2f}"
        later = f"from the second round on from the student of the round before, {share}"
    if ensemble is None:
        return f"learnt {later}" if later else ""
    count, each = len(ensemble["models"]), members_words(ensemble, lambda name: f"`{shown(name)}`")
    if "average" not in ensemble:
        return f"learnt each row from one of {count} teachers: {each}"
    sure = ", weighted by their confidence" if ensemble["confidence"] else ""
    return f"learnt from the mean of {count} teachers' {ensemble['average']}{sure}: {each}" + (
        f"; {later}" if later else ""
    )


def members_words(ensemble: Mapping[str, Any], shown: Callable[[str], str]) -> str:
    """The models of an ensemble, each with its weight or with the names of its rows."""
    models = ensemble["models"]
    if "average" not in ensemble:
        return ", ".join(f"{shown(model['model'])} for {' and '.join(model['teaches'])}" for model in models)
    return ", ".join(f"{model['weight']:.2f} {shown(model['model'])}" for model in models)


def teachers_note(metrics: Mapping[str, Any], shown: Callable[[str], str] = str) -> str:
    """The same as a sentence."""
    words = taught_words(metrics, shown)
    return f"The student {words}." if words else ""


def rows_note(metrics: Mapping[str, Any]) -> str:
    """What a student without data learnt from, and what its scores are of; empty where there was data."""
    made = metrics.get("synthetic")
    if made is None:
        return ""
    count = f"{made['rows']['train']:,}"
    learnt = (
        f"There was no data to learn from: {count} rows were made from models ({made['method']}, seed {made['seed']})."
    )
    if made["method"] == "generator":
        learnt = f"There was no data to learn from: a generator made rows beside the student (seed {made['seed']})."
    if made["real_test"]:
        return f"{learnt} Scores are of real rows."
    if metrics["metric"] == "agreement":
        return f"{learnt} Scores are the agreement with the teacher on {made['rows']['test']:,} further rows, not on real ones."
    return f"{learnt} Scores are of {made['rows']['test']:,} further rows that were made, not of real ones."


def provenance(metrics: Mapping[str, Any]) -> str:
    """One sentence with the versions of libraries and the time of the run; empty if `metrics` has neither."""
    versions = ", ".join(f"{name} {version}" for name, version in (metrics.get("versions") or {}).items())
    made = f"Made with {versions}" if versions else ""
    took = f"the run took {duration(metrics['seconds'])}" if metrics.get("seconds") is not None else ""
    sentence = "; ".join(part for part in (made, took) if part)
    return f"{sentence[0].upper()}{sentence[1:]}." if sentence else ""
