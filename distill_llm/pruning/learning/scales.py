"""One factor for every kept head and neuron, learnt from the model that was cut, and folded into the weights.

A cut changes how strongly what is left should speak. Per unit one number is few enough to be learnt from calibration rows: the
weights stay, the divergence from the model before the cut teaches, and afterwards each factor is multiplied into the columns that
read its unit, so that nothing of it is left but other weights.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.architectures.modes import frozen
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.finite import NotFinite
from distill_llm.losses.items import check_tokens_known, kind_of, row_count
from distill_llm.models.limits import batch_faults, limits_of
from distill_llm.models.placement import check_in_memory, checkpointed, streamed
from distill_llm.pruning.cutting.strength import row_divergences
from distill_llm.pruning.learning.scaling import DEFAULT_SCALING, Scaling
from distill_llm.pruning.learning.units import BLOCKS, MaskedUnits
from distill_llm.pruning.statistics.calibration_loss import divergences, items_of
from distill_llm.pruning.statistics.processes import from_main_process, process, sum_over_processes
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.units.sizes import counts_of

Batch = Mapping[str, torch.Tensor]
FIX = "a smaller learning_rate, or check the calibration rows"


def learn_scales(
    student: PreTrainedModel,
    model: PreTrainedModel,
    dataloader: Iterable[Batch],
    how: Scaling = DEFAULT_SCALING,
    *,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> torch.Tensor:
    """Learn a factor for each KV group and each FFN neuron of a cut model, by KL(model || student).

    A step takes a forward pass of the model, one of the student, and a backward pass of the student without gradients of weights.
    Nothing is changed; `fold_scales` writes the factors into the weights.

    Args:
        student: what was cut from `model`, mostly after compensation.
        dataloader: batches as for `collect_statistics`; labels are not needed. A step reads one, and after the last one comes
            the first.
        settings: the device and precision; with `sharded`, each process takes a part of every batch's rows; with
            `checkpointing`, the activations of one layer of the student at a time are held.

    Returns:
        (U,) factors, near 1: layer by layer, KV groups first, then neurons.

    Raises:
        InputError: no batches, a row that is too long, units that cannot be scaled, or a model that is not whole on one device.
        NotFinite: the divergence of a step, or a factor, is nan or infinite.
    """
    batches, device = list(dataloader), settings.device_for(student)
    if not batches:
        raise InputError("dataloader", batches, "at least one batch of rows")
    for batch in batches:
        raise_all(batch_faults(limits_of(model.config, type(model).__name__), batch, "dataloader"))
        check_tokens_known(batch, "dataloader")
    for each in (model, student):
        check_in_memory(each, one_device=True)
    units = _units_of(student)
    factors = torch.ones(len(units), device=device, requires_grad=True)
    optimizer = torch.optim.Adam([factors], lr=how.learning_rate)
    with ExitStack() as stack:
        for each in (model, student):
            stack.enter_context(frozen(each))
            if device != each.device:
                stack.enter_context(streamed(each, layers_of(each), device))
        stack.enter_context(torch.autocast(device.type, settings.precision, enabled=settings.precision is not None))
        stack.enter_context(units.multiplied(student, lambda: factors))
        if settings.checkpointing:
            stack.callback(layers_of(student)[0].register_forward_pre_hook(_differentiable, with_kwargs=True).remove)
            stack.enter_context(checkpointed(layers_of(student)))
        for step in range(how.steps):
            own = _part(batches[step % len(batches)], settings.sharded)
            loss, factors.grad = _gradient(student, model, own, factors, settings.sharded)
            if not loss.isfinite():
                raise NotFinite(
                    "the divergence from the model before the cut", str(loss.item()), FIX, stage="scales", step=step + 1
                )
            optimizer.param_groups[0]["lr"] = how.learning_rate * (1 - step / how.steps)
            optimizer.step()
    if not factors.isfinite().all():
        raise NotFinite("a scale of a unit", "nan or infinite", FIX, stage="scales")
    return from_main_process(factors.detach().cpu())


def fold_scales(student: PreTrainedModel, scales: torch.Tensor) -> None:
    """Multiply the weights that read each unit by its factor of `scales` (U,), in place."""
    _units_of(student).fold(student, scales)


@dataclass(frozen=True)
class Scaled:
    """What scales did on rows that they were not learnt from.

    Attributes:
        before, after: the divergence of the student from the model, the mean over rows; None: it is not finite, or there were
            no rows.
        rows: how many there were.
        folded: whether the scales are in the student now.
    """

    before: float | None
    after: float | None
    rows: int
    folded: bool

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def has_units(student: PreTrainedModel) -> bool:
    """Whether there is a head or a neuron that could be scaled."""
    return bool(_kinds(student))


def described_scales(record: Mapping[str, Any]) -> str:
    """The record of what scales of units did, in words."""
    if not record["rows"]:
        return "a scale for each unit learnt"
    done = "learnt" if record["folded"] else "learnt and left out"
    before, after = ("not finite" if record[k] is None else f"{record[k]:.4g}" for k in ("before", "after"))
    return f"a scale for each unit {done}: divergence on {record['rows']} held-out rows {before} without, {after} with them"


def scale_units(
    student: PreTrainedModel,
    model: PreTrainedModel,
    dataloader: Iterable[Batch],
    held_out: Iterable[Batch],
    how: Scaling = DEFAULT_SCALING,
    *,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> Scaled:
    """Learn scales and fold them into the student, in place, if the rows held out are nearer to the model with them.

    Without such rows they are folded in. For the arguments and errors see `learn_scales`.
    """
    scales, rows = learn_scales(student, model, dataloader, how, settings=settings), list(held_out)
    before = after = None
    count, folded = 0, True
    if rows:
        dense: list[torch.Tensor] | None = [] if kind_of(model) == "example" else None  # of tokens they would be large
        found = row_divergences(model, student, rows, settings, dense)
        with scaled(student, scales):
            changed = row_divergences(model, student, rows, settings, dense)
        before, after = (mean if isfinite(mean := float(each.mean())) else None for each in (found, changed))
        count, folded = len(found), after is not None and (before is None or after < before)
    result = from_main_process(Scaled(before, after, count, folded))
    if result.folded:
        fold_scales(student, scales)
    return result


@contextmanager
def scaled(student: PreTrainedModel, scales: torch.Tensor) -> Iterator[None]:
    """Within, the student gives what it would with these scales (U,) folded in."""
    with _units_of(student).multiplied(student, lambda: scales):
        yield


def _units_of(student: PreTrainedModel) -> MaskedUnits:
    return MaskedUnits(student, _kinds(student), unit_costs(student), may_go=False)


def _kinds(student: PreTrainedModel) -> list[str]:
    counts = counts_of(student)
    return [kind for kind in BLOCKS if any(each[kind] for each in counts)]


def _differentiable(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """What the first layer reads, with a gradient: checkpointed layers pass none on to the factors without one."""
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _part(batch: Batch, sharded: bool) -> Batch | None:
    """This process's rows of a batch; None if it has none."""
    rank, processes = process() if sharded else (0, 1)
    rows = row_count(batch)
    if rank >= rows:
        return None
    return {name: value[rank::processes] if len(value) == rows else value for name, value in batch.items()}


def _gradient(
    student: PreTrainedModel, model: PreTrainedModel, batch: Batch | None, factors: torch.Tensor, sharded: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean divergence of a batch's items, of all processes, and its gradient with respect to the factors."""
    device, factors.grad = factors.device, None
    total, gradient, count = torch.zeros((), device=device), torch.zeros_like(factors), torch.zeros((), device=device)
    if batch is not None:
        batch = {name: value.to(device) for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            target, _ = items_of(model, batch, labelled=False)
        with torch.enable_grad():
            items = divergences(target, items_of(student, batch, labelled=False)[0])
            own = items.sum()
        own.backward()  # torch.autograd.grad does not go through checkpointed layers
        assert factors.grad is not None
        total, gradient, count = own.detach(), factors.grad, count + len(items)
    sums = [total, gradient, count]
    if sharded:
        sum_over_processes(sums)
    return sums[0] / count.clamp(min=1), sums[1] / count.clamp(min=1)
