"""What a plan keeps of every layer: as rows for metrics.json, as a table for the terminal, and as a figure."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from distill_llm.architectures.lineage import Counts, lineage_of
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of, hidden_size, sources_in
from distill_llm.report.figures import kept_figure
from distill_llm.report.tables import MISSING, percent


def kept_by(plan: PruningPlan, model: PreTrainedModel) -> list[dict[str, Any]]:
    """What a plan keeps of every layer of `model` that stays.

    A row has `source`, `heads` of `heads_of`, their indices `heads_kept`, and `neurons` of `neurons_of`. Where queries share keys
    and values, heads are KV groups, and `queries` and `queries_of` are added.
    """
    counts = counts_of(model)
    return [_row(row.source, row.counts(counts[row.source]), row.heads, counts) for row in plan.layers]


def kept_of(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[list[dict[str, Any]], dict[str, int] | None]:
    """As `kept_by`, but of a student that was pruned from `teacher`, compared with the teacher as it is now.

    Returns:
        The rows; and the channels of the residual stream as `kept` and `of`, None if all stay. ([], None) for a student that
        was not pruned.
    """
    lineage, before = lineage_of(student), lineage_of(teacher)
    if lineage is None or student.config.model_type != teacher.config.model_type:
        return [], None
    channels = {"kept": hidden_size(student), "of": hidden_size(teacher)}
    counts, rows = counts_of(teacher), []
    for source, left, layer in zip(sources_in(student, teacher), counts_of(student), lineage.layers, strict=True):
        heads = layer.heads if before is None else [before.layers[source].heads.index(head) for head in layer.heads]
        rows.append(_row(source, left, heads, counts))
    return rows, channels if channels["kept"] < channels["of"] else None


def _row(source: int, left: Counts, heads: Iterable[int], counts: Sequence[Counts]) -> dict[str, Any]:
    row: dict[str, Any] = {"source": source, "heads_kept": list(heads)}
    for kind in _kinds(counts):
        row |= {kind: left[kind], f"{kind}_of": counts[source][kind]}
    return row


def _kinds(counts: Sequence[Counts]) -> list[str]:
    """Kinds of units to show: queries only where they share keys and values."""
    grouped = any(each["queries"] != each["heads"] for each in counts)
    return ["heads", "queries", "neurons"] if grouped else ["heads", "neurons"]


def plan_table(plan: PruningPlan, model: PreTrainedModel, title: str = "plan") -> Table:
    """A row per layer of `model`: kept and all heads, queries (if they share keys) and neurons, and the share of parameters."""
    counts, costs = counts_of(model), unit_costs(model)
    kept = {row.source: row.counts(counts[row.source]) for row in plan.layers}
    width = costs.hidden if plan.hidden is None else len(plan.hidden)
    caption = None if width == costs.hidden else f"{width} of {costs.hidden} channels of the residual stream kept"
    caption = "; ".join(part for part in (caption, plan.note) if part) or None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", show_footer=True)
    kinds = _kinds(counts)
    table.add_column("layer", footer="all", justify="right")
    for kind in kinds:
        left, whole = (sum(each[kind] for each in rows) for rows in (kept.values(), counts))
        heading = "groups" if "queries" in kinds and kind == "heads" else kind
        table.add_column(heading, footer=f"{left:,} / {whole:,}", justify="right")
    table.add_column("parameters", footer=percent(costs.of(kept.values(), width) / costs.of(counts)), justify="right")
    for i, has in enumerate(counts):
        if i not in kept:
            table.add_row(str(i), *[MISSING] * len(kinds), "removed", style="dim")
            continue
        cells = [f"{kept[i][kind]} / {has[kind]}" for kind in kinds]
        table.add_row(str(i), *cells, percent(costs.of([kept[i]], width) / costs.of([has])))
    return table


def plan_figure(plan: PruningPlan, model: PreTrainedModel, path: Path) -> Path:
    """Draw what a plan keeps of every layer of `model`; save it as PNG at `path`."""
    hidden = None if plan.hidden is None else {"kept": len(plan.hidden), "of": hidden_size(model)}
    record = {"plan_layers": kept_by(plan, model), "plan_hidden": hidden, "teacher": {"layers": len(counts_of(model))}}
    found = kept_figure(record, path)
    assert found is not None
    return found
