"""What the loss becomes without each layer, measured by leaving it out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modes import forward_as, frozen, passed_on
from distill_llm.common.errors import InputError, one_of, raise_all
from distill_llm.losses.labels import label_loss
from distill_llm.models.adapters import unmerged_faults
from distill_llm.models.placement import streamed
from distill_llm.pruning.statistics.calibration_loss import divergences, items_of
from distill_llm.pruning.statistics.processes import process, sum_over_processes
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings


@torch.no_grad()
def leave_one_out(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    statistics: Statistics,
    loss: str = "labels",
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> Statistics:
    """The statistics completed with `without`, which criterion leave_one_out reads.

    One forward pass, and for each layer one more through the layers after it: in all about half as many whole passes as there
    are layers. Every layer's output is held, of one batch at a time.

    Args:
        model: the model that the statistics are of; unchanged.
        dataloader: batches as for `collect_statistics`.
        loss: "labels" for the task's loss (for a language model, log of the perplexity; Kim et al. 2024, section 3.2),
            "kl" for the divergence of the whole model's outputs from those without the layer.
        settings: how the pass runs: precision, device, whether it is sharded.

    Returns:
        A copy with `without`, (layers,) in nats per output that counts (squared error for a regression), less the whole model's.

    Raises:
        InputError: another loss, or batches without the labels that it needs.
    """
    if loss not in ("labels", "kl"):
        raise InputError("loss", loss, one_of(("labels", "kl"), loss))
    raise_all(unmerged_faults(model))
    layers, labelled = list(layers_of(model)), loss == "labels"
    rank, processes = process() if settings.sharded else (0, 1)
    at = settings.device_for(model)
    exact = torch.zeros(len(layers) + 1, dtype=torch.float64)
    autocast = torch.autocast(at.type, settings.precision, enabled=settings.precision is not None)
    there = nullcontext() if at == model.device else streamed(model, layers, at)
    with frozen(model), there, autocast:
        for number, batch in enumerate(dataloader):
            if number % processes == rank:
                batch = {name: value.to(at) for name, value in batch.items()}
                exact += _without_each(model, layers, batch, labelled).cpu().double()
    if settings.sharded:
        sum_over_processes([exact])
    return replace(statistics, without=(exact[:-1] / exact[-1].clamp(min=1)).float()).check()


def _without_each(
    model: PreTrainedModel, layers: Sequence[nn.Module], batch: Mapping[str, torch.Tensor], labelled: bool
) -> torch.Tensor:
    """(layers + 1,): what a batch's loss gains without each layer, summed over items, and last the number of items."""
    totals = torch.zeros(len(layers) + 1, device=next(iter(batch.values())).device)
    with _outputs(layers) as given:
        dense, labels = items_of(model, batch, labelled)
    whole = 0.0 if labels is None else label_loss(dense, labels).sum()
    totals[-1] = len(dense)
    for i, layer in enumerate(layers):
        with ExitStack() as stack:
            for before, output in zip(layers[:i], given, strict=False):
                stack.enter_context(forward_as(before, _again(output)))
            stack.enter_context(forward_as(layer, _passing_on(given[i])))
            logits, _ = items_of(model, batch, labelled)
        totals[i] = divergences(dense, logits).sum() if labels is None else label_loss(logits, labels).sum() - whole
    return totals


@contextmanager
def _outputs(layers: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Within the context, a list that each layer's output is added to, in the order of the layers."""
    given: list[Any] = []
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(lambda module, args, output: given.append(output)).remove)
        yield given


def _again(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _passing_on(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: passed_on(args, kwargs, output)
