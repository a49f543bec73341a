"""Shares of a model's cost: what a student has of its teacher's, and the least that rules can leave."""

from transformers import PreTrainedModel

from distill_llm.pruning.planning.rules import PlanningRules
from distill_llm.pruning.units.costs import unit_costs
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
    rows, width = rules.least(shapes), rules.least_width(costs.hidden)
    left = costs.of(rows, width)
    if "layers" in rules.units:
        left = min(costs.of([rows[i]], width, [i]) for i in rules.last_layers(len(rows)))
    return left / costs.of(shapes)
