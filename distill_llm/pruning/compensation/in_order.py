"""Compensation in order: every linear that adds to the residual stream is fitted to what it reads in the cut model.

The attention-output and FFN-down linears of the cut model are taken from the first to the last. Let z be the input of one in the
cut model, in which all linears before it are fitted already; D and K the residual stream before it in the dense and in the cut
model; and D' the dense stream where the cut model's next such linear begins. Its new weights are the ridge regression of
(D' - D + share (D - K)) / c on z, drawn towards the kept columns of the old weights. Here c is what the family multiplies the
output by, mostly 1. D' - D is c times the linear's output in the dense model, plus what was removed whole right after it.

(Fits to the inputs of the model as it is cut: AdaPrune, Hubara et al. 2021; SparseGPT, Frantar and Alistarh 2023. The correction
of the stream is that of a feedback: what was missed is asked for again.)
"""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.modes import frozen
from distill_llm.common.errors import InputError, raise_all
from distill_llm.losses.items import check_tokens_known, valid_tokens
from distill_llm.models.limits import batch_faults, limits_of
from distill_llm.models.placement import check_in_memory
from distill_llm.pruning.compensation.layer_runs import Batch, LayerRuns, Streams, noted, residual_factor, stopped
from distill_llm.pruning.compensation.linear import solve
from distill_llm.pruning.compensation.stations import DenseStream, Fitted, ffn_first, fitted_linears
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.statistics.processes import process, sum_over_processes
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.units.refusals import NORMED_AFTER, in_order_faults
from distill_llm.pruning.units.sizes import weight_of


@dataclass(frozen=True)
class InOrder:
    """How strongly linears are fitted in order.

    Attributes:
        ridge: what draws the weights to the kept columns of the old ones, as a share of the mean square of a linear's inputs.
        share: of the difference between the dense and the cut model's residual stream, what each linear is to make up for.

    Raises:
        InputError: a ridge that is not above 0, or a share outside 0 to 1.
    """

    ridge: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.ridge < float("inf"):
            raise InputError("ridge", self.ridge, "a number above 0")
        if not 0 <= self.share <= 1:
            raise InputError("share", self.share, "from 0 to 1")


DEFAULT_IN_ORDER = InOrder()


@torch.no_grad()
def refit_in_order(
    student: PreTrainedModel,
    model: PreTrainedModel,
    plan: PruningPlan,
    dataloader: Iterable[Batch],
    how: InOrder = DEFAULT_IN_ORDER,
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> None:
    """Fit the linears of a student that was cut by a plan, in place, to what they read in it.

    It takes the time of one forward pass of the model and about two and a half of the student, without their heads, and holds
    four residual streams of all rows in main memory.

    Args:
        student: what `prune(model, plan)` makes, without compensation.
        model: what was cut; unchanged.
        dataloader: batches as for `collect_statistics`; labels are not needed.
        how: the ridge, and the share of the stream's error.
        settings: the device and precision, and whether each process takes a part of the batches (`sharded`).

    Raises:
        InputError: a plan that removes channels of the residual stream, a family in which a norm comes after attention or FFN,
            or activations that are not finite.
    """
    raise_all(in_order_faults(model, plan.hidden is not None, "compensate"))
    check_in_memory(model, one_device=True)
    every, limits = list(dataloader), limits_of(model.config, type(model).__name__)
    for batch in every:
        raise_all(batch_faults(limits, batch, "dataloader"))
        check_tokens_known(batch, "dataloader")
    if not every:
        raise InputError("dataloader", every, "at least one batch of rows")
    rank, processes = process() if settings.sharded else (0, 1)
    batches = every[rank::processes]
    with ExitStack() as stack:
        for each in (model, student):
            stack.enter_context(frozen(each))
        factor = residual_factor(model, every[0], settings)
        if factor is None:
            raise InputError("compensate", "in_order", fix=NORMED_AFTER.format(model.config.model_type))
        fitted = fitted_linears(student, model, plan)
        dense = DenseStream(LayerRuns(model, batches, settings), ffn_first(model, plan), factor)
        masks = [valid_tokens(batch).flatten() for batch in batches]
        _Refit(LayerRuns(student, batches, settings), dense, masks, how).over(fitted)


class _Refit:
    """The student's linears, fitted one after the other.

    Args:
        runs: the student's layers.
        masks: of each batch, which of its R T tokens count.
    """

    def __init__(self, runs: LayerRuns, dense: DenseStream, masks: list[torch.Tensor], how: InOrder):
        self.runs, self.dense, self.masks, self.how = runs, dense, masks, how
        self.factor = dense.factor

    def over(self, fitted: list[Fitted]) -> None:
        """Fit all, in order. Linears before the first that lost something stay as they are: nothing is off there."""
        first = next((i for i, each in enumerate(fitted) if not each.whole), None)
        if first is None:
            return
        layer, streams = 0, list(self.runs.first)
        if first:  # up to here both models are the same
            layer, start = fitted[first].layer, 2 * (fitted[first].start // 2)
            streams = list(self.dense.between(start, start)[0])
        self.runs.first = []  # freed as the streams move on
        for each in fitted[first:]:
            while layer < each.layer:
                self._advance(layer, streams)
                layer += 1
            self._fit(each, streams)

    def _advance(self, layer: int, streams: Streams) -> None:
        """Replace the streams before a layer by those after it."""
        with self.runs.layer(layer) as run:
            for number, stream in enumerate(streams):
                streams[number] = run(number, stream).cpu()

    def _fit(self, each: Fitted, streams: Streams) -> None:
        module, bias = each.module, each.module.bias
        start, end = self.dense.between(each.start, each.end)
        old, sums = weight_of(module).detach(), _Sums(each.module, self.runs.device)
        with self.runs.layer(each.layer) as run:
            for number, stream in enumerate(streams):
                with noted([module], [] if each.before is None else [each.before], stop=True) as found:
                    stopped(partial(run, number, stream))
                wide = torch.promote_types(
                    stream.dtype, torch.float32
                )  # differences of bf16 streams lose what is small
                dense = start[number].to(wide)
                wanted = end[number].to(wide) - dense - self.factor * each.constant
                if self.how.share:
                    own = stream.to(wide)
                    if each.before is not None:
                        own = own + self.factor * found["out"][0].view_as(stream).cpu()
                    wanted = wanted + self.how.share * (dense - own)
                sums.add(found["in"][0].flatten(0, -2), wanted.flatten(0, -2) / self.factor, self.masks[number])
        if self.runs.settings.sharded:
            sum_over_processes(sums.tensors())
        weight, shift = sums.solution(self.how.ridge)
        new = (old.to(weight) + weight).to(old)
        module.weight.copy_(new.T if isinstance(module, Conv1D) else new)
        if bias is not None:
            bias.copy_((bias.to(shift) + shift).to(bias))


class _Sums:
    """Sums over tokens of z z^T and z r^T with a linear's inputs z (K,) and what it misses r (H,).

    They are in fp64; each batch's products are in fp32, or in fp64 where the model is.
    """

    def __init__(self, module: nn.Linear | Conv1D, device: torch.device):
        self.device = torch.device("cpu") if device.type == "mps" else device  # which has no fp64
        self.module, (outputs, inputs) = module, weight_of(module).shape
        self.second, self.cross = self._zeros(inputs, inputs), self._zeros(inputs, outputs)
        self.mean, self.missed, self.count = self._zeros(inputs), self._zeros(outputs), self._zeros()

    def _zeros(self, *sizes: int) -> torch.Tensor:
        return torch.zeros(sizes, dtype=torch.float64, device=self.device)

    def add(self, z: torch.Tensor, y: torch.Tensor, valid: torch.Tensor) -> None:
        """Add the valid ones (R T,) of a batch's tokens: inputs (R T, K), wanted outputs (R T, H)."""
        z, y = (each.to(self.device)[valid.to(self.device)] for each in (z, y))
        dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
        old, bias = weight_of(self.module), self.module.bias
        z, old = z.to(dtype), old.to(self.device, dtype)
        missed = y.to(dtype) - z @ old.T - (0.0 if bias is None else bias.to(self.device, dtype))
        self.second += z.T @ z
        self.cross += z.T @ missed
        self.mean += z.sum(0)
        self.missed += missed.sum(0)
        self.count += len(z)

    def tensors(self) -> list[torch.Tensor]:
        """All sums."""
        return [self.second, self.cross, self.mean, self.missed, self.count]

    def solution(self, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
        """What is added to the weight (H, K) and to the bias (H,) where there is one."""
        second, cross, mean, missed = (each / self.count.clamp(min=1e-30) for each in self.tensors()[:4])
        damping = ridge * second.diagonal().mean() + torch.finfo(torch.float32).tiny
        if self.module.bias is not None:
            second, cross = second - torch.outer(mean, mean), cross - torch.outer(mean, missed)
        weight = solve(second, cross, damping).T
        return weight, missed - weight @ mean
