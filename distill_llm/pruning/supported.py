"""What of which family can be pruned, as a list and as a table."""

from dataclasses import dataclass

from rich import box
from rich.table import Table
from transformers import CONFIG_MAPPING

from distill_llm.architectures.families import FAMILIES
from distill_llm.pruning.names import UNITS


@dataclass(frozen=True)
class Support:
    """What can be pruned of a family.

    Attributes:
        grouped: whether query heads can share keys, so that the heads that go are KV groups, and queries can go alone.
        units: what can be removed, any number of each in any layer.
        stock: of these, what plain transformers can load without our code, where every layer keeps the same number.
        dividing: whether for that the query heads that stay must divide the width that stays.
    """

    family: str
    grouped: bool
    units: tuple[str, ...]
    stock: tuple[str, ...]
    dividing: bool


def supported() -> list[Support]:
    """A row per family, by name."""
    return [_support(family) for family in sorted(FAMILIES)]


def _support(family: str) -> Support:
    grouped = any(hasattr(CONFIG_MAPPING[family], name) for name in ("num_key_value_heads", "num_kv_heads"))
    units: tuple[str, ...] = tuple(unit for unit in UNITS if grouped or unit != "queries")
    stock = tuple(unit for unit in units if unit in FAMILIES[family].stock)
    return Support(family, grouped, units, stock, FAMILIES[family].dividing)


def families_table() -> Table:
    """`supported` for people."""
    table = Table("family", *UNITS, title="families that can be pruned", box=box.SIMPLE_HEAD, pad_edge=False)
    for row in supported():
        marks = {unit: "stock" if unit in row.stock else "yes" if unit in row.units else "-" for unit in UNITS}
        if row.dividing:
            marks |= {unit: f"{marks[unit]}/" for unit in ("heads", "queries", "hidden") if unit in row.stock}
        if row.grouped:
            marks["heads"] += "*"
        table.add_row(row.family, *marks.values())
    table.caption = (
        "yes: any number in any layer. stock: moreover, where every layer keeps the same number, the student is a plain "
        "transformers model. stock/: if its number of query heads divides its width; uniform plans choose such numbers where "
        "the budget allows. *: KV groups, heads that go with the queries that share their key."
    )
    return table
