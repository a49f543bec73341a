"""The gallery of the shipped recipes: a page for each, and the table of all, in Markdown."""

from collections.abc import Iterable

from distill_llm.recipe.gallery import Entry, small_run
from distill_llm.report.report import provenance
from distill_llm.report.tables import MISSING, columns, latency_note, markdown_table, percent, results_table, score_note


def overview(found: Iterable[Entry]) -> str:
    """A row for each recipe: its paper, and the result of its small run."""
    head = ["recipe", "paper", "layers kept", "teacher", "student", "speed-up"]
    body = []
    for entry in found:
        cells = [MISSING] * 4
        if entry.result is not None:
            metrics, models = entry.result.metrics, columns(entry.result.metrics)
            scores = [f"{metrics['metric']} {models[0].shown}", models[-1].shown]
            cells = [percent(metrics["layer_params_kept"]), *scores, f"{metrics['speedup']:.2f}x"]
        body.append([f"[`{entry.name}`](#{entry.name})", entry.about.paper.split(",")[0] or MISSING, *cells])
    return markdown_table(head, body)


def page(entry: Entry) -> str:
    """What a recipe does, its paper, its cost, how it is run, and what came of it where it was tried."""
    about = entry.about
    parts = [f"### {entry.name}", f"{entry.recipe.description[0].upper()}{entry.recipe.description[1:]}.", about.does]
    for title, text in (("Paper", about.paper), ("Not as in the paper", about.differs), ("Cost", about.cost)):
        if text:
            parts.append(f"**{title}.** {text[0].upper()}{text[1:].removesuffix('.')}.")
    parts.append(_code([*about.before, f"distill-llm run {entry.name}"]))
    return "\n\n".join([*parts, *_result(entry)]) + "\n"


def _result(entry: Entry) -> list[str]:
    result, (commands, _) = entry.result, small_run(entry.name, entry.about)
    if result is None:
        reason = entry.about.untried or "not run yet. A test runs the recipe with tiny models. A small run would be"
        return [
            f"**Result.** None: {reason}{':' if entry.about.here else '.'}",
            *([_code(commands)] if entry.about.here else []),
        ]
    notes = [result.data, score_note(result.metrics), latency_note(result.metrics)]
    made = f"{result.date}, {result.threads} thread{'s' if result.threads > 1 else ''}, beside other work."
    return [
        f"**Result** of {'a small run' if entry.about.here else 'this run'}:",
        *([_code(commands)] if entry.about.here else []),
        results_table(result.metrics).rstrip(),
        " ".join([*filter(None, notes), provenance(result.metrics), made]),
    ]


def _code(commands: Iterable[str]) -> str:
    """Commands as a code block; long ones go on over several lines, before an option."""
    lines = []
    for command in commands:
        parts = command.split(" --")
        line = parts[0]
        for part in parts[1:]:
            if len(line) + len(part) > 94:
                lines.append(f"{line} \\")
                line = f"    --{part}"
            else:
                line = f"{line} --{part}"
        lines.append(line)
    return "\n".join(["```sh", *lines, "```"])
