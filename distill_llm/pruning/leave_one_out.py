"""What the loss becomes without each layer, measured by leaving it out."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.capture import item_logits, packed
from distill_llm.errors import InputError, one_of
from distill_llm.losses.items import kind_of, targets
from distill_llm.pruning.families import layers_of
from distill_llm.pruning.masking import masked
from distill_llm.pruning.plan import PruningPlan, full_plan
from distill_llm.pruning.statistics import Statistics
from distill_llm.teachers.online import forward_inputs


@torch.no_grad()
def leave_one_out(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    statistics: Statistics,
    loss: str = "labels",
    reduce: Callable[[list[torch.Tensor]], None] | None = None,
) -> Statistics:
    """The statistics completed with `without`, for criterion leave_one_out: as many forward passes as there are layers, and one.

    Args:
        model: the model that the statistics are of; unchanged.
        dataloader: batches as for `collect_statistics`.
        loss: "labels" for the task's loss (for a language model, log of the perplexity; Kim et al. 2024, section 3.2),
            "kl" for the divergence of the whole model's outputs from those without the layer.
        reduce: adds up sums in place over processes that each see a part of the data (`sharding.sum_over_processes`).

    Returns:
        A copy with `without`: (layers,) nats per output that counts (squared error for a regression), less the whole model's.

    Raises:
        InputError: for another loss, or batches without the labels it needs.
    """
    if loss not in ("labels", "kl"):
        raise InputError("loss", loss, one_of(("labels", "kl"), loss))
    whole, layers = full_plan(model), range(len(layers_of(model)))
    plans = [replace(whole, layers=tuple(row for row in whole.layers if row.source != i)) for i in layers]
    training, totals = model.training, torch.zeros(len(plans) + 1, dtype=torch.float64)
    model.eval()
    for batch in dataloader:
        batch = {name: value.to(model.device) for name, value in batch.items()}
        if loss == "labels" and "labels" not in batch:
            raise InputError("dataloader", sorted(batch), "batches with labels, or loss='kl'")
        dense, labels = _logits(model, batch, None, loss)
        totals[-1] += len(dense)
        for i, plan in enumerate(plans):
            without, _ = _logits(model, batch, plan, loss)
            totals[i] += (_loss(without, dense, labels) - _loss(dense, dense, labels)).item()
    model.train(training)
    if reduce is not None:
        reduce([totals])
    return replace(statistics, without=(totals[:-1] / totals[-1].clamp(min=1)).float())


def _logits(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], plan: PruningPlan | None, loss: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(items, C) logits of the outputs that count, and their labels for loss "labels"."""
    kind, inputs = kind_of(model), forward_inputs(model, batch)
    positions, labels = None, batch.get("labels")
    if kind != "example":
        unlabelled = {name: value for name, value in batch.items() if name != "labels"}
        positions, labels = targets(batch if loss == "labels" else unlabelled, kind)
    if plan is None:
        with packed(model, positions):
            found = model(**inputs).logits
    else:
        with masked(model, plan), packed(model, positions):
            found = model(**inputs).logits
    return item_logits(found, positions).float(), labels if loss == "labels" else None


def _loss(logits: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
    if labels is None and logits.shape[-1] > 1:
        log_p, log_q = dense.log_softmax(-1), logits.log_softmax(-1)
        return nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if logits.shape[-1] == 1:
        target = dense if labels is None else labels.view_as(logits).float()
        return nn.functional.mse_loss(logits, target, reduction="sum")
    assert labels is not None
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
