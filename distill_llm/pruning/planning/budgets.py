"""Shares of a model's cost: what a student has of its teacher's, and the least that rules can leave."""

from collections.abc import Iterable, Sequence

from transformers import PreTrainedModel

from distill_llm.architectures.lineage import LAYER_UNITS, Counts
from distill_llm.pruning.planning.rules import PlanningRules
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.kinds import KINDS
from distill_llm.pruning.units.sizes import counts_of, hidden_size, sources_in


def share_of(
    student: PreTrainedModel, teacher: PreTrainedModel, cost: str, batch_size: int = 32, sequence_length: int = 64
) -> float:
    """The share of the teacher's layers' cost (see `unit_costs`) that the student's layers have."""
    costs = unit_costs(teacher, cost, batch_size, sequence_length)
    left = costs.of(counts_of(student), hidden_size(student), sources_in(student, teacher))
    return left / costs.of(counts_of(teacher))


def least_share(
    model: PreTrainedModel, rules: PlanningRules, cost: str, batch_size: int, sequence_length: int
) -> float:
    """The share of the layers' cost that stays when everything is removed that the rules allow; one layer always stays."""
    costs, shapes = unit_costs(model, cost, batch_size, sequence_length), counts_of(model)
    rows, width = least_counts(rules, shapes), rules.least_width(costs.hidden)
    left = costs.of(rows, width)
    if "layers" in rules.units:
        left = min(costs.of([rows[i]], width, [i]) for i in rules.last_layers(len(rows)))
    return left / costs.of(shapes)


def least_counts(rules: PlanningRules, layers: Sequence[Counts]) -> list[dict[str, int]]:
    """The counts of units that every layer must keep as long as it stays, given the counts that it has."""

    def least(kind: str, has: int) -> int:
        limit, fine = getattr(rules.limits, kind, 0), KINDS[kind].fine
        if not rules.cuts(kind, limit):
            return has
        # Equal shares leave a unit to each layer that has one, but of those that budgets are met with.
        limit, step = max(limit, int(rules.local and kind in rules.units and not fine)), rules.round_to if fine else 1
        return min(-(-limit // step) * step, has, fewest(layer[kind] for layer in layers) if rules.uniform else has)

    rows = [{kind: least(kind, layer[kind]) for kind in LAYER_UNITS} for layer in layers]
    for row, layer in zip(rows, layers, strict=True):
        for kind, outer in inner_kinds().items():
            each = layer[kind] // layer[outer] if layer[outer] else 0
            row[kind] = row[outer] * (min(each, 1) if kind in rules.units else each)
    return rows


def inner_kinds() -> dict[str, str]:
    """The kinds whose units are within those of another kind, and which."""
    return {kind: unit.within for kind, unit in LAYER_UNITS.items() if unit.within is not None}


def fewest(counts: Iterable[int]) -> int:
    """The smallest number of units in a layer, among the layers that have any."""
    return min((count for count in counts if count), default=0)
