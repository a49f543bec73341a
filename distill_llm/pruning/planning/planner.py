"""Choosing what stays: from scores, under a budget, to a plan."""

from typing import Literal, Unpack

from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, one_of
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning.competing import plan_for_costs
from distill_llm.pruning.planning.latency import LatencySettings, plan_for_latency
from distill_llm.pruning.planning.rules import PlanningRules, RuleOptions
from distill_llm.pruning.units.costs import COSTS, Costs, unit_costs


def plan_pruning(
    model: PreTrainedModel,
    scores: Importance,
    keep: float,
    *,
    cost: Literal["params", "flops", "memory", "latency"] | Costs = "params",
    batch_size: int = 32,
    sequence_length: int = 64,
    **rules: Unpack[RuleOptions],
) -> PruningPlan:
    """Choose what stays so that `keep` of the layers' cost remains, never more, and as near below as the units allow.

    Args:
        scores: from `score(...)`, for this very model.
        keep: share of the layers' cost, in (0, 1]; with cost "latency" of the whole model's.
        cost: parameters; FLOPs; memory, with the keys and values that are cached; latency, measured on the model's device (see
            `plan_for_latency`, which has more settings); or what units were found to cost (`latency_costs`).
        batch_size, sequence_length: of the batch (B, T) that FLOPs and memory are counted for and latency is measured on.
        units: what may be removed: heads (KV groups), queries (equally many of every group), neurons, whole layers, the whole
            attention or FFN of a layer, hidden (channels of the residual stream). Default: heads and neurons.
        scope: with "global", the default, units compete over all layers. Where the criterion's scores are comparable between
            kinds of units (Fisher), all kinds compete by score per cost, at what a unit costs in what is left; otherwise each
            kind keeps the same share, layers as nearly as their number allows. With "local" every layer keeps the same share
            of its heads and of its neurons, apart from its limits, and at least one head where it has any. Of the whole numbers
            that come nearest to the budget (within 1%), the most even shares are taken.
        round_to: neurons of a layer, and channels of the residual stream, stay in multiples of this, at most the width of the
            narrowest FFN. Where neurons come in coarse steps, heads take up the rest of the budget. Default: 1.
        uniform: give every layer the same numbers, none more than the smallest layer that has any. Of the numbers that meet the
            budget, those are chosen that the family's own config takes (of Llama and Gemma: query heads that divide the
            width), so that plain transformers can load the student. Whole layers by block influence and uniform widths by
            activation are Minitron's plan (Muralidharan et al. 2024, section 2). Default: False.
        limits: the fewest units that every remaining layer keeps, where it has that many (`Limits`).

    Raises:
        InputError: a value out of range, units that these rules cannot remove together, or a `keep` that these units cannot
            reach.
    """
    if isinstance(cost, str) and cost not in (*COSTS, "latency"):
        raise InputError("cost", cost, one_of((*COSTS, "latency"), cost))
    chosen = PlanningRules(**rules)
    if cost == "latency":
        return plan_for_latency(model, scores, keep, LatencySettings(batch_size, sequence_length), chosen)
    costs = cost if isinstance(cost, Costs) else unit_costs(model, cost, batch_size, sequence_length)
    return plan_for_costs(model, scores, keep, costs, chosen)
