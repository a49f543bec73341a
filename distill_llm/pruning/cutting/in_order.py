"""A model cut by a plan, with its linears fitted in order."""

from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import raise_all
from distill_llm.pruning.compensation.in_order import DEFAULT_IN_ORDER, InOrder, refit_in_order
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.units.refusals import in_order_faults


def prune_in_order(
    model: PreTrainedModel,
    plan: PruningPlan,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    how: InOrder = DEFAULT_IN_ORDER,
    *,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> PreTrainedModel:
    """A new model with only what the plan keeps, as `prune`, compensated in order (see `refit_in_order`)."""
    raise_all(in_order_faults(model, plan.hidden is not None, "compensate"))
    student = prune(model, plan)
    refit_in_order(student, model, plan, dataloader, how, settings)
    return student
