"""What the loss becomes without each layer, measured by leaving it out."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modes import forward_as, frozen
from distill_llm.common.errors import InputError, one_of
from distill_llm.losses.labels import label_loss
from distill_llm.models.placement import streamed
from distill_llm.pruning.statistics.calibration_loss import divergence, items_of
from distill_llm.pruning.statistics.processes import process, sum_over_processes
from distill_llm.pruning.statistics.record import Statistics


@torch.no_grad()
def leave_one_out(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    statistics: Statistics,
    loss: str = "labels",
    *,
    precision: torch.dtype | None = None,
    sharded: bool = False,
    device: torch.device | str | None = None,
) -> Statistics:
    """The statistics completed with `without`, for criterion leave_one_out.

    One forward pass, and for each layer one of those after it: half as many whole passes as there are layers. Every layer's
    output is held, of one batch at a time.

    Args:
        model: the model that the statistics are of; unchanged.
        dataloader: batches as for `collect_statistics`.
        loss: "labels" for the task's loss (for a language model, log of the perplexity; Kim et al. 2024, section 3.2),
            "kl" for the divergence of the whole model's outputs from those without the layer.
        precision: run the forward passes under autocast in this dtype.
        device: compute there with the weights of one layer at a time (see `collect_statistics`).
        sharded: on several processes, take this process's part of the batches and add up (see `collect_statistics`).

    Returns:
        A copy with `without`: (layers,) nats per output that counts (squared error for a regression), less the whole model's.

    Raises:
        InputError: for another loss, or batches without the labels it needs.
    """
    if loss not in ("labels", "kl"):
        raise InputError("loss", loss, one_of(("labels", "kl"), loss))
    layers, labelled = list(layers_of(model)), loss == "labels"
    rank, processes = process() if sharded else (0, 1)
    at = model.device if device is None else torch.device(device)
    totals = torch.zeros(len(layers) + 1, device=at)  # in the order of layers, then the number of items
    exact = torch.zeros(len(layers) + 1, dtype=torch.float64)
    autocast = torch.autocast(at.type, precision, enabled=precision is not None)
    there = nullcontext() if at == model.device else streamed(model, layers, at)
    with frozen(model), there, autocast:
        for number, batch in enumerate(dataloader):
            if number % processes != rank:
                continue
            batch = {name: value.to(at) for name, value in batch.items()}
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
                totals[i] = divergence(dense, logits) if labels is None else label_loss(logits, labels).sum() - whole
            exact += totals.cpu().double()
    if sharded:
        sum_over_processes([exact])
    return replace(statistics, without=(exact[:-1] / exact[-1].clamp(min=1)).float())


@contextmanager
def _outputs(layers: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """Within the context, what each layer gave, in their order."""
    given: list[Any] = []
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(lambda module, args, output: given.append(output)).remove)
        yield given


def _again(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _passing_on(output: Any) -> Callable[..., Any]:
    """A layer's forward that gives what it reads, and beside it what it gave beside its `output`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        entering = args[0] if args else kwargs["hidden_states"]
        return (entering, *output[1:]) if isinstance(output, tuple) else entering

    return forward
