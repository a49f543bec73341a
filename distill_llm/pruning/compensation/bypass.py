"""A linear bypass of what is removed whole: an FFN that stays takes over what was added to the residual stream after it.

Let z be the input of its FFN-down linear W and d what the removed attentions and FFNs after it, up to the next FFN that stays,
added to the stream. The new weight is the least squares of W z + d on the neurons that are left: compensation of a linear
whose inputs are z and d, with d removed. Nothing is added to the model. (ReplaceMe, Shopkhoev et al. 2025, fits a matrix
after the FFN in place of removed layers; here each neuron's column is free, and neurons of the same FFN may go at once.)

Where attention and FFN are in parallel, the FFN of its own layer takes over a removed attention: it does not read what that
added, and the FFN before would hand it on to both.

Where a norm closes every layer (BERT and its kin), a run of removed layers is taken over by the FFN just before it: d is by how
much the sum before the last removed layer's closing norm is more than that before the FFN's own, whose place that norm takes.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.architectures.modes import frozen
from distill_llm.common.errors import InputError
from distill_llm.pruning.compensation.linear import RIDGE, compensate_linear
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.statistics.calibration_loss import calibration_loss
from distill_llm.pruning.statistics.calibration_pass import CalibrationPass, first_of
from distill_llm.pruning.statistics.hooks import CalibrationBatch
from distill_llm.pruning.statistics.moments import Moments, MomentsSum
from distill_llm.pruning.statistics.processes import sum_over_processes
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.units.sizes import counts_of, linear, weight_of

# A module of a layer: the layer, and the path in it.
Place = tuple[int, str]


@dataclass(frozen=True)
class Bypasses:
    """What FFNs that stay are to take over, for one model and plan; `bool` says whether there is any.

    Attributes:
        plan: what is removed.
        moments: by the layer of the FFN that takes over, in the model before: over I + H channels, first the input of its
            FFN-down linear (I), then what it takes over (H).
        outputs: the attention-output and FFN-down linears whose outputs are taken over.
        norms: by the same layers, the norms that take the place of their closing ones.
    """

    plan: PruningPlan
    moments: Mapping[int, Moments] = field(default_factory=dict)
    outputs: frozenset[Place] = frozenset()
    norms: Mapping[int, Place] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.moments)

    def folded(self, module: nn.Linear | Conv1D, layer: int, kept: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """New weight (H, K) and bias (H,) or None of an FFN-down linear that keeps `kept` (K,) of its neurons.

        Raises:
            InputError: bypasses of a model of other sizes.
        """
        weight, moments = weight_of(module).detach(), self.moments[layer]
        outputs, inputs = weight.shape
        if len(moments.mean) != outputs + inputs:
            raise InputError(
                "bypasses", "bypasses of a model of other sizes", "the result of fit_bypasses for this model"
            )
        both = torch.cat([weight, torch.eye(outputs, device=weight.device, dtype=weight.dtype)], 1)
        squares = moments.second.diagonal()
        ridge = RIDGE * squares[:inputs].mean() / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)
        return compensate_linear(both, module.bias, moments, kept, float(ridge))


def outputs_taken_over(model: PreTrainedModel, plan: PruningPlan) -> dict[int, list[Place]]:
    """By layer, for every FFN that stays: what the plan removes whole after it and before the next FFN that stays.

    An attention in parallel with an FFN that stays belongs to this. What is removed before the first FFN that stays has none to
    take it over.
    """
    family, rows = family_of(model), {row.source: row for row in plan.layers}
    found: dict[int, list[Place]] = {}
    last: int | None = None
    for layer, has in enumerate(counts_of(model)):
        row = rows.get(layer)
        if family.parallel and row is not None and row.neurons:
            last = layer
        gone = [(layer, family.attention_out)] if row is None or (has["queries"] and not row.heads) else []
        if row is None or (has["neurons"] and not row.neurons):
            gone.append((layer, family.ffn_out))
        if last is not None and gone:
            found.setdefault(last, []).extend(gone)
        if row is not None and row.neurons:
            last = layer
    return found


def runs_taken_over(model: PreTrainedModel, plan: PruningPlan) -> dict[int, int]:
    """By layer, for every FFN that stays and has removed layers just after it: the last of these.

    Not where something comes between that layer and the next (a convolution).
    """
    anchored = family_of(model).anchored
    ends = [row.source for row in plan.layers[1:]] + [len(layers_of(model))]
    pairs = zip(plan.layers, ends, strict=True)
    return {
        row.source: end - 1
        for row, end in pairs
        if row.neurons and end > row.source + 1 and (row.source or not anchored)
    }


@torch.no_grad()
def fit_bypasses(
    model: PreTrainedModel,
    plan: PruningPlan,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    settings: CalibrationSettings = DEFAULT_SETTINGS,
) -> Bypasses:
    """One forward pass for what `prune(model, plan, ..., bypasses=)` needs; none where the plan removes nothing whole.

    There is no bypass where an FFN's output has a norm of its own before it is added (Gemma 2 and 3, OLMo 2): what is added is
    not linear in the FFN's weights. Where a norm closes every layer there is none for an attention or FFN that is removed
    alone, nor with channels of the residual stream, which change that norm.

    Args:
        model: the model that is to be pruned; unchanged.
        plan: what stays of it.
        dataloader: batches as for `collect_statistics`; no labels are read.
        settings: how the pass runs: precision, device, whether it is sharded.

    Returns:
        The bypasses, of all tokens; (I + H)^2 fp32 numbers for each FFN that takes over.

    Raises:
        InputError: if the plan does not fit the model, or the model is offloaded or spread over devices.
    """
    plan.check(model)
    calibration = CalibrationPass(model, None, settings=settings)
    taken, runs = outputs_taken_over(model, plan), runs_taken_over(model, plan)
    shown, batches = first_of(dataloader) if taken else (None, [])
    norm = None if shown is None else _closing_norm(model, min(taken), shown)
    if norm is None or (norm and (not runs or plan.hidden is not None)):
        return Bypasses(plan)
    layers, down = layers_of(model), family_of(model).ffn_out
    state = calibration.batch()
    taps = {i: _Tap(state, linear(layers[i], down)) for i in (runs if norm else taken)}

    def add() -> None:
        for tap in taps.values():
            tap.add()

    with ExitStack() as stack:
        stack.enter_context(calibration.prepared(from_embeddings=False))
        for i, tap in taps.items():
            if norm:
                tap.watch_norms(layers[i].get_submodule(norm), layers[runs[i]].get_submodule(norm))
            else:
                stay = {row.source for row in plan.layers}
                tap.watch_outputs([(linear(layers[source], path), source in stay) for source, path in taken[i]])
            stack.callback(tap.remove)
        calibration.over(batches, state, add)
    if settings.sharded:
        sum_over_processes([tensor for tap in taps.values() for tensor in tap.moments.tensors()])
    moments = {i: tap.moments.finish() for i, tap in taps.items()}
    if norm:
        return Bypasses(plan, moments, norms={i: (last, norm) for i, last in runs.items()})
    return Bypasses(plan, moments, frozenset(place for each in taken.values() for place in each))


class _Tap:
    """Of each batch the input of an FFN-down linear beside what it takes over."""

    def __init__(self, state: CalibrationBatch, down: nn.Linear | Conv1D):
        outputs, inputs = weight_of(down).shape
        self.state, self.moments = state, MomentsSum(inputs + outputs, state.device)
        self.input: torch.Tensor | None = None
        self.added: torch.Tensor | float = 0.0
        self.handles = [down.register_forward_pre_hook(self._see_input)]

    def _see_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.input = self.state.by_token(args[0])

    def _take(self, value: torch.Tensor, sign: int = 1) -> None:
        found = self.state.by_token(value)
        assert found is not None
        self.added = self.added + sign * found.float()

    def watch_outputs(self, linears: Iterable[tuple[Any, bool]]) -> None:
        """Take over the outputs of linears; but for the bias of one whose layer stays, where it is added as before."""

        def hook_of(stays: bool) -> Callable:
            return lambda module, args, output: self._take(
                output - module.bias if stays and module.bias is not None else output
            )

        self.handles += [module.register_forward_hook(hook_of(stays)) for module, stays in linears]

    def watch_norms(self, own: nn.Module, last: nn.Module) -> None:
        """Take over what the input of the norm `last` is more than that of `own`."""
        for norm, sign in ((own, -1), (last, 1)):
            hook: Any = lambda module, args, sign=sign: self._take(args[0], sign)  # noqa: E731
            self.handles.append(norm.register_forward_pre_hook(hook))

    def add(self) -> None:
        """The batch is over."""
        assert self.input is not None and isinstance(self.added, torch.Tensor)
        self.moments.add(torch.cat([self.input.float(), self.added], -1).flatten(0, 1), valid=self.state.valid)
        self.input, self.added = None, 0.0

    def remove(self) -> None:
        """Watch no more."""
        for handle in self.handles:
            handle.remove()


def _closing_norm(model: PreTrainedModel, layer: int, batch: Mapping[str, torch.Tensor]) -> str | None:
    """The path in a layer of the norm that gives out what the layer does, "" where none does; None where what the FFN gives out
    is not added before it (or to the layer's output) as it is, or times a constant.

    Measured on a batch's first example: noise as large as the FFN's output, added to it, must come out there alike.
    """
    block, first = layers_of(model)[layer], {k: v[:1].to(model.device) for k, v in batch.items()}
    entering: dict[str, list[torch.Tensor]] = {}
    made: dict[str, torch.Tensor] = {}
    outputs: list[torch.Tensor] = []
    pushes: list[torch.Tensor] = []

    def push(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not outputs:
            return None
        noise = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(0)).to(output.device)
        pushes.append(noise * torch.maximum(outputs[0].float().std(), output.float().std()))
        return output + pushes[0].view_as(output).to(output.dtype)

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))

    def see_norm(path: str) -> Callable:
        def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            made.setdefault(path, output)
            entering.setdefault(path, []).append(args[0].flatten(0, -2))

        return hook

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.callback(linear(block, family_of(model).ffn_out).register_forward_hook(push).remove)
        stack.callback(block.register_forward_hook(see).remove)
        for path, module in block.named_modules():
            if "Norm" in type(module).__name__:
                stack.callback(module.register_forward_hook(see_norm(path)).remove)
        for _ in range(2):
            calibration_loss(model, first, None, None, torch.Generator())
    closing = [path for path, output in made.items() if output.data_ptr() == outputs[0].data_ptr()]
    before, after = entering[closing[0]] if closing else outputs
    change = (after.float() - before.float()).flatten()
    alike = nn.functional.cosine_similarity(change, pushes[0].float().flatten(), dim=0) > 0.99
    return (closing[0] if closing else "") if alike else None
