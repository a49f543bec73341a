"""Choosing what stays: from scores, under a budget, to a plan."""

from collections.abc import Sequence
from typing import Any, Literal

from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, one_of
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.names import Unit
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning.candidate import NO_LIMITS, Limits
from distill_llm.pruning.planning.competing import check_settings, plan_for_costs
from distill_llm.pruning.planning.latency import plan_for_latency
from distill_llm.pruning.units.costs import COSTS, Costs, unit_costs


def plan_pruning(
    model: PreTrainedModel,
    scores: Importance,
    keep: float,
    *,
    cost: Literal["params", "flops", "memory", "latency"] | Costs = "params",
    units: Sequence[Unit] = ("heads", "neurons"),
    scope: Literal["global", "local"] = "global",
    round_to: int = 1,
    uniform: bool = False,
    batch_size: int = 32,
    sequence_length: int = 64,
    limits: Limits = NO_LIMITS,
) -> PruningPlan:
    """Choose what stays so that `keep` of the layers' cost remains, never more, and as near below as the units allow.

    With scope "global" units compete over all layers; where the criterion's scores are comparable between kinds of units
    (Fisher) all kinds compete by score per cost, at what a unit costs in what is left; else each kind keeps the same share,
    layers as nearly as their number allows. With scope "local" every layer keeps the same share of its heads and of its
    neurons, but for its limits, and a head where it has any. `uniform` gives every layer the same numbers, none more than the
    smallest layer has that has any; of numbers that meet the budget those that the family's own config takes (Llama's and
    Gemma's: of query heads that divide the width), so that plain transformers can load the student. (Layers by block influence
    and uniform widths by activation are Minitron's plan, Muralidharan et al. 2024, section 2.)

    Args:
        scores: from `score(...)`, for this very model.
        keep: share of the layers' cost, in (0, 1]; with cost "latency" of the whole model's.
        cost: parameters; FLOPs; memory, with the keys and values that are cached; latency, measured on the model's device (see
            `plan_for_latency`, which has more to set); or what units were found to cost (`latency_costs`).
        units: what may be removed: heads (KV groups), queries (equally many of every group), neurons, whole layers, the whole
            attention or FFN of a layer, hidden (channels of the residual stream).
        round_to: neurons of a layer, and channels of the residual stream, stay in multiples of this.
        batch_size, sequence_length: of the batch (B, T) that FLOPs and memory are counted for, latency measured.
        limits: what every remaining layer keeps at least, where it has that much.

    Raises:
        InputError: for a value out of range, units that these settings cannot remove together, or a `keep` that these units
            cannot reach.
    """
    if isinstance(cost, str) and cost not in (*COSTS, "latency"):
        raise InputError("cost", cost, one_of((*COSTS, "latency"), cost))
    options: dict[str, Any] = {"units": units, "scope": scope, "round_to": round_to, "uniform": uniform}
    if cost == "latency":
        check_settings(model, scores, keep, **options)
        options |= {"limits": limits, "batch_size": batch_size, "sequence_length": sequence_length}
        return plan_for_latency(model, scores, keep, **options)
    costs = cost if isinstance(cost, Costs) else unit_costs(model, cost, batch_size, sequence_length)
    return plan_for_costs(model, scores, keep, costs, limits=limits, **options)
