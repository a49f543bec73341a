"""What a plan keeps of every layer, as rows for metrics.json, as a table for the terminal and as a picture."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from transformers import PreTrainedModel

from distill_llm.architectures.families import lineage_of
from distill_llm.architectures.modeling_pruned import Sizes
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import hidden_size, sizes_of, sources_in
from distill_llm.report.figures import kept_figure
from distill_llm.report.tables import MISSING, percent


def kept_by(plan: PruningPlan, model: PreTrainedModel) -> list[dict[str, int]]:
    """What a plan keeps of every layer of `model` that stays: `source`, `heads`, `neurons`; with `_of` behind, how many it has.

    Where queries share keys and values, heads are KV groups, and there are `queries` and `queries_of`.
    """
    sizes, rows = sizes_of(model), []
    for row in plan.layers:
        shared = sizes[row.source].queries // sizes[row.source].groups if row.heads else 0
        queries = len(row.heads) * shared if row.queries is None else len(row.queries)
        rows.append((row.source, Sizes(queries, len(row.heads), len(row.neurons))))
    return _counts(rows, sizes)


def kept_of(student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[list[dict[str, int]], dict[str, int] | None]:
    """As `kept_by`, of a student that was pruned from `teacher` (as that is now); and its channels, where some are gone.

    The channels of the residual stream as `kept` and `of`. ([], None) where the student was not pruned.
    """
    if lineage_of(student) is None or student.config.model_type != teacher.config.model_type:
        return [], None
    channels = {"kept": hidden_size(student), "of": hidden_size(teacher)}
    kept = _counts(zip(sources_in(student, teacher), sizes_of(student), strict=True), sizes_of(teacher))
    return kept, channels if channels["kept"] < channels["of"] else None


def _counts(rows: Iterable[tuple[int, Sizes]], sizes: Sequence[Sizes]) -> list[dict[str, int]]:
    grouped, found = _grouped(sizes), []
    for source, left in rows:
        whole = sizes[source]
        counts = {"source": source, "heads": left.groups, "neurons": left.neurons}
        counts |= {"heads_of": whole.groups, "neurons_of": whole.neurons}
        found.append(counts | ({"queries": left.queries, "queries_of": whole.queries} if grouped else {}))
    return found


def _grouped(sizes: Sequence[Sizes]) -> bool:
    return any(size.queries != size.groups for size in sizes)


def plan_table(plan: PruningPlan, model: PreTrainedModel, title: str = "plan") -> Table:
    """Per layer of `model`: heads, queries of shared groups, and neurons kept of how many, and the share of its parameters."""
    kept = {row["source"]: row for row in kept_by(plan, model)}
    sizes, costs = sizes_of(model), unit_costs(model)
    width = costs.hidden if plan.hidden is None else len(plan.hidden)
    grouped = _grouped(sizes)
    caption = None if width == costs.hidden else f"{width} of {costs.hidden} channels of the residual stream"
    caption = "; ".join(part for part in (caption, plan.note) if part) or None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left", show_footer=True)
    names = ("heads", "queries", "neurons") if grouped else ("heads", "neurons")
    everything = {"heads": "groups", "queries": "queries", "neurons": "neurons"}
    table.add_column("layer", footer="all", justify="right")
    for name in names:
        left = sum(row.get(name, row["heads"]) for row in kept.values())
        whole = sum(getattr(size, everything[name]) for size in sizes)
        heading = "groups" if grouped and name == "heads" else name
        table.add_column(heading, footer=f"{left:,} / {whole:,}", justify="right")
    shapes = [(size.groups, size.neurons, size.queries) for size in sizes]
    remaining = costs.of([_shape(row) for row in kept.values()], width)
    table.add_column("parameters", footer=percent(remaining / costs.of(shapes)), justify="right")
    for i, shape in enumerate(shapes):
        row = kept.get(i)
        if row is None:
            table.add_row(str(i), *[MISSING] * len(names), "removed", style="dim")
            continue
        cells = [f"{row.get(name, row['heads'])} / {row.get(f'{name}_of', row['heads_of'])}" for name in names]
        table.add_row(str(i), *cells, percent(costs.of([_shape(row)], width) / costs.of([shape])))
    return table


def _shape(row: Mapping[str, int]) -> tuple[int, int, int]:
    return row["heads"], row["neurons"], row.get("queries", row["heads"])


def plan_figure(plan: PruningPlan, model: PreTrainedModel, path: Path) -> Path:
    """Draw what a plan keeps of every layer of `model`; saved as PNG at `path`."""
    hidden = None if plan.hidden is None else {"kept": len(plan.hidden), "of": hidden_size(model)}
    record = {"plan_layers": kept_by(plan, model), "plan_hidden": hidden, "teacher": {"layers": len(sizes_of(model))}}
    found = kept_figure(record, path)
    assert found is not None
    return found
