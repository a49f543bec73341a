"""Exits of a language model in the report: a table, a figure, and how to read them."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from distill_llm.report.drawing import bare, new_figure
from distill_llm.report.palette import LIGHT
from distill_llm.report.tables import Cells, percent


def draft_cells(found: Mapping[str, Any]) -> Cells:
    """A row per exit, all layers first: next tokens, and drafting after it."""
    whole = found["whole"]
    head = ["after", "perplexity", "same next token", "drafts accepted", "tokens a run", "tokens a second"]
    plain = [
        f"{whole['layers']} (all)",
        f"{whole['perplexity']:.4g}",
        "",
        "",
        "1.00",
        f"{whole['tokens_per_second']:.1f}",
    ]
    body = [plain]
    for row in found["exits"]:
        name = f"{row['layers']}" + (" (in the config)" if row["layers"] == found["draft"] else "")
        error = "" if row["speedup_error"] is None else f" ± {row['speedup_error']:.2f}"
        speed = f"{row['tokens_per_second']:.1f} ({row['speedup']:.2f}{error}x)"
        shares = [percent(row["agreement"]), percent(row["accepted"])]
        body.append([name, f"{row['perplexity']:.4g}", *shares, f"{row['tokens_per_run']:.2f}", speed])
    return Cells(head, body)


def draft_note(found: Mapping[str, Any], device: str) -> str:
    """What was measured, and how the drafts are used."""
    lines = [
        "After each exit, the model's own norm and head say the next token: with that perplexity, and the same likeliest one as"
        f" all layers, on the test rows. Drafts by the layers before an exit, checked by all layers, wrote {found['texts']}"
        f" text(s) of at most {found['new_tokens']} new tokens, one at a time, in turn with greedy writing without drafts, on"
        f" {device}."
    ]
    other = {row["layers"]: found["texts"] - row["same"] for row in found["exits"] if row["same"] < found["texts"]}
    if other:
        said = ", ".join(f"{count} after {layers}" for layers, count in other.items())
        lines.append(f"Texts that are not the same as without drafts, by rounding: {said}.")
    if found["draft"] is None:
        lines.append(
            "No exit drafts faster than the model writes alone by more than one standard error over texts: none is in the config."
        )
    else:
        lines.append("The exit in the config is the earliest within one standard error of the fastest.")
        lines.append('Write with drafts: `model.generate(..., assistant_early_exit=model.config.exits["draft"])`.')
    return " ".join(lines)


def draft_summary(found: Mapping[str, Any]) -> str:
    """The result in a sentence; empty where no exit drafts faster."""
    for row in found["exits"]:
        if row["layers"] == found["draft"]:
            return (
                f"With drafts by its first {row['layers']} of {found['layers']} layers it writes {row['speedup']:.2f} times as"
                f" fast: {percent(row['accepted'])} of the drafted tokens are accepted."
            )
    return ""


def draw_drafts(found: Mapping[str, Any]) -> Figure:
    """By exit, how often its likeliest next token is that of all layers, and how much of its drafts is accepted."""
    figure = new_figure(height=3.0)
    axes = bare(figure.subplots())
    layers = [row["layers"] for row in found["exits"]]
    lines = (("agreement", "teal", "o", "same next token"), ("accepted", "ember", "D", "drafts accepted"))
    for name, color, marker, label in lines:
        shares = [100 * row[name] for row in found["exits"]]
        axes.plot(layers, shares, color=LIGHT[color], marker=marker, markersize=5, linewidth=1.6, label=label)
    axes.set_ylim(0, 105)
    axes.set_xticks(layers)
    axes.set_xlabel(f"layers before the exit, of {found['layers']}", color=LIGHT["muted"], fontsize=10)
    axes.set_title("percent", fontsize=10, color=LIGHT["ink"], loc="left")
    axes.grid(axis="y", color=LIGHT["line"], linewidth=0.8)
    style: dict[str, Any] = {"frameon": False, "labelcolor": LIGHT["ink"], "fontsize": 10, "columnspacing": 1}
    figure.legend(loc="outside lower center", ncols=2, **style)
    return figure
