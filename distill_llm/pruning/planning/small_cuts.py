"""A removal done in several small cuts: how far each goes, and the one plan that they make together."""

from transformers import PreTrainedModel

from distill_llm.architectures.lineage import compose
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.units.sizes import counts_of


def cut_shares(before: float, after: float, cuts: int) -> list[float]:
    """The share that stays after each of `cuts` cuts from `before` to `after`: each keeps the same part of what it finds."""
    return [before * (after / before) ** (number / cuts) for number in range(1, cuts)] + [after]


def compose_plans(model: PreTrainedModel, first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """The plan that leaves of `model` what `second` leaves of what `first` left.

    Args:
        model: what `first` is for.
        second: a plan for `prune(model, first)`; the result has its `kept` and `note`.
    """
    both = compose(first, second, counts_of(model).__getitem__)
    return PruningPlan(first.model_type, both.layers, second.kept, second.note, whole=both.whole)
