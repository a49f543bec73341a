"""Compensation in order: every linear that adds to the residual stream is fitted to what it reads in the cut model.

The attention-output and FFN-down linears of the cut model are taken from the first to the last. Let z be the input of one in the
cut model, in which all linears before it are fitted already; D and K the residual stream before it in the dense and in the cut
model; and D' the dense stream where the cut model's next such linear begins. Its new weights are the ridge regression of
(D' - D + share (D - K)) / c on z, drawn towards the kept columns of the old weights. Here c is what the family multiplies the
output by, mostly 1. D' - D is c times the linear's output in the dense model, plus what was removed whole right after it.

(Fits to the inputs of the model as it is cut: AdaPrune, Hubara et al. 2021; SparseGPT, Frantar and Alistarh 2023. The correction
of the stream is that of a feedback: what was missed is asked for again.)
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of
from distill_llm.architectures.modes import frozen
from distill_llm.common.errors import InputError, raise_all
from distill_llm.losses.items import check_tokens_known, valid_tokens
from distill_llm.models.limits import batch_faults, limits_of
from distill_llm.models.placement import check_in_memory
from distill_llm.pruning.compensation.layer_runs import (
    Batch,
    LayerRuns,
    Streams,
    adding_faults,
    attention_gives,
    read_by,
)
from distill_llm.pruning.compensation.linear import solve
from distill_llm.pruning.compensation.stations import DenseStream, Fitted, Linears, adding, ffn_first, fitted_linears
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.statistics.processes import process, sum_over_processes
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.units.refusals import in_order_faults
from distill_llm.pruning.units.sizes import linear, weight_of


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

    It takes the time of one forward pass of the model and one of the student, without their heads, and of the sums. Main memory
    holds four residual streams of all rows (five where the next attention is gone whole); or two and what an FFN's last linear
    reads (its kept neurons), where that is more.

    Args:
        student: what `prune(model, plan)` makes, without compensation.
        model: what was cut; unchanged.
        dataloader: batches as for `collect_statistics`; labels are not needed.
        how: the ridge, and the share of the stream's error.
        settings: the device and precision, and whether each process takes a part of the batches (`sharded`).

    Raises:
        InputError: a plan that removes channels of the residual stream, layers that do more than add what attention and FFN give
            to it, or activations that are not finite.
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
        raise_all(adding_faults(model, every[0], settings, "compensate"))
        swapped = ffn_first(model, plan)
        those = adding(model, swapped)
        own = adding(student, {index for index, row in enumerate(plan.layers) if row.source in swapped})
        dense = DenseStream(LayerRuns(model, batches, settings), those)
        masks = [valid_tokens(batch).flatten() for batch in batches]
        _Refit(LayerRuns(student, batches, settings), own, dense, masks, how).over(fitted_linears(own, those, plan))


class _Refit:
    """The student's linears, fitted one after the other.

    Args:
        runs: the student's layers.
        adding: its linears that add to the stream.
        masks: of each batch, which of its R T tokens count.
    """

    def __init__(
        self,
        runs: LayerRuns,
        adding: Linears,
        dense: DenseStream,
        masks: list[torch.Tensor],
        how: InOrder,
    ):
        self.runs, self.adding, self.dense, self.masks, self.how = runs, adding, dense, masks, how
        self.family, self.factor = family_of(runs.model), dense.factor

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
        those: dict[nn.Module, Fitted] = {each.module: each for each in fitted[first:]}
        for index in range(layer, fitted[-1].layer + 1):
            self._layer(index, streams, those)

    def _layer(self, index: int, streams: Streams, those: Mapping[nn.Module, Fitted]) -> None:
        """Fit those of a layer's linears that are to be, and replace the streams before the layer by those after it."""
        outputs: Streams = []
        for module in self.adding[index]:
            if module in those:
                inputs = self._fit(those[module], streams, outputs)
            else:
                inputs = self._read(index, module, streams, outputs)
            outputs = self.runs.outputs(module, inputs)
        for number, stream in enumerate(streams):
            streams[number] = self._added(stream, outputs.pop(0))

    def _added(self, stream: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        return stream + self.factor * output.view_as(stream)

    def _read(
        self,
        index: int,
        module: nn.Module,
        streams: Streams,
        outputs: Streams,
        note: Callable[[int, torch.Tensor], None] = lambda number, z: None,
    ) -> Streams:
        """What a linear of a layer reads in each batch.

        Args:
            streams: before the layer; of the batches that were read, with the outputs added.
            outputs: of the layer's linear before this one, if there is one; emptied.
            note: is called with each batch's number and inputs.
        """
        layer, inputs = self.runs.layers[index], []
        with self.runs.layer(index) as run:
            for number, stream in enumerate(streams):
                with ExitStack() as stack:
                    if outputs:
                        streams[number] = self._added(stream, outputs[0])
                        if module is linear(layer, self.family.ffn_out):
                            given = outputs[0].view_as(stream).to(self.runs.device)
                            stack.enter_context(attention_gives(layer, self.family, given))
                        del outputs[0]
                    inputs.append(read_by(module, partial(run, number, stream)).cpu())
                note(number, inputs[-1])
        return inputs

    def _fit(self, each: Fitted, streams: Streams, outputs: Streams) -> Streams:
        """Fit a linear to what it reads in each batch, which is returned (see `_read`)."""
        start, end = self.dense.between(each.start, each.end)
        sums = _Sums(each.module, self.runs.device)

        def add(number: int, z: torch.Tensor) -> None:
            wide = torch.promote_types(streams[number].dtype, torch.float32)  # bf16 differences lose what is small
            dense = start.pop(0).to(wide)
            wanted = end[number].to(wide) - dense - self.factor * each.constant
            if self.how.share:
                wanted = wanted + self.how.share * (dense - streams[number].to(wide))
            sums.add(z.flatten(0, -2), wanted.flatten(0, -2) / self.factor, self.masks[number])

        inputs = self._read(each.layer, each.module, streams, outputs, add)
        if self.runs.settings.sharded:
            sum_over_processes(sums.tensors())
        weight, shift = sums.solution(self.how.ridge)
        module, bias = each.module, each.module.bias
        new = (weight_of(module).detach().to(weight) + weight).to(module.weight)
        module.weight.copy_(new.T if isinstance(module, Conv1D) else new)
        if bias is not None:
            bias.copy_((bias.to(shift) + shift).to(bias))
        return inputs


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
