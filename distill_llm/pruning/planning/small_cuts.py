"""A removal done in several small cuts: how far each goes, and the one plan that they make together."""

from transformers import PreTrainedModel

from distill_llm.architectures.modeling_pruned import Sizes, all_queries
from distill_llm.pruning.plan import LayerPlan, PruningPlan
from distill_llm.pruning.units.sizes import sizes_of


def cut_shares(before: float, after: float, cuts: int) -> list[float]:
    """The share that stays after each of `cuts` cuts from `before` to `after`: each keeps the same part of what it finds."""
    return [before * (after / before) ** (number / cuts) for number in range(1, cuts)] + [after]


def compose_plans(model: PreTrainedModel, first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """The plan that leaves of `model` what `second` leaves of what `first` left.

    Args:
        model: what `first` is for.
        second: a plan for `prune(model, first)`; the result has its `kept` and `note`.
    """
    sizes, layers = sizes_of(model), []
    for row in second.layers:
        before = first.layers[row.source]
        heads = tuple(before.heads[i] for i in row.heads)
        known = before.queries or all_queries(before.heads, sizes[before.source])
        left = all_queries(row.heads, Sizes(len(known), len(before.heads), 0)) if row.queries is None else row.queries
        queries = tuple(known[i] for i in left)
        whole = queries == all_queries(heads, sizes[before.source])
        neurons = tuple(before.neurons[i] for i in row.neurons)
        layers.append(LayerPlan(before.source, heads, neurons, None if whole else queries))
    hidden = first.hidden
    if second.hidden is not None:
        hidden = second.hidden if hidden is None else tuple(hidden[i] for i in second.hidden)
    return PruningPlan(first.model_type, tuple(layers), second.kept, second.note, hidden)
