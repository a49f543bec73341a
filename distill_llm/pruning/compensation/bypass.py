"""Linear bypasses: an FFN that stays takes over what whole attentions, FFNs and layers after it added to the residual stream.

Let W be the weight of the FFN-down linear, z its input, and d the sum of what the removed attentions and FFNs added to the
stream, from this FFN up to the next one that stays. The new weight is the least-squares fit of W z + d on the neurons that
stay. This is the compensation of a linear whose inputs are z and d and which loses d. The model gets no new modules.
(ReplaceMe, Shopkhoev et al. 2025, fits one matrix after the FFN in place of removed layers. Here every neuron's column is
fitted, and neurons of the same FFN may be removed at the same time.)

If attention and FFN run in parallel, a removed attention is taken over by the FFN of its own layer. That FFN does not read what
the attention added. The FFN before it would pass its output on to both.

If a norm closes every layer (BERT and related families), the FFN just before a run of removed layers takes over the whole run.
Then d is the input of the last removed layer's closing norm minus the input of the FFN's own closing norm, and the former norm
replaces the latter.
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
from distill_llm.pruning.compensation.linear import compensate_linear
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.statistics.calibration_loss import calibration_loss
from distill_llm.pruning.statistics.calibration_pass import CalibrationPass, first_of
from distill_llm.pruning.statistics.hooks import CalibrationBatch
from distill_llm.pruning.statistics.moments import Moments, MomentsSum
from distill_llm.pruning.statistics.processes import sum_over_processes
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings
from distill_llm.pruning.units.sizes import counts_of, linear, weight_of

# A module: the index of its layer, and its path in the layer.
Place = tuple[int, str]


@dataclass(frozen=True)
class Bypasses:
    """What the remaining FFNs take over, for one model and plan; false if they take over nothing.

    Attributes:
        plan: what is removed.
        moments: second moments over I + H channels, by the layer of the FFN that takes over (its index before pruning). The
            first I channels are the input of its FFN-down linear, the other H are what it takes over.
        outputs: the attention-output and FFN-down linears whose outputs are taken over.
        norms: by the same layers, the norms that replace their closing norms.
    """

    plan: PruningPlan
    moments: Mapping[int, Moments] = field(default_factory=dict)
    outputs: frozenset[Place] = frozenset()
    norms: Mapping[int, Place] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.moments)

    def folded(
        self, module: nn.Linear | Conv1D, layer: int, kept: torch.Tensor, ridge: float
    ) -> tuple[torch.Tensor, Any]:
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
        share = ridge * squares[:inputs].mean() / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)
        return compensate_linear(both, module.bias, moments, kept, float(share))


def outputs_taken_over(model: PreTrainedModel, plan: PruningPlan) -> dict[int, list[Place]]:
    """For every FFN that stays, by layer: the whole attentions and FFNs that the plan removes between it and the next one.

    They include a removed attention that runs in parallel with the FFN. Nothing takes over what is removed before the first FFN
    that stays.
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
    """For every FFN that stays and is followed by removed layers, by layer: the last of these layers.

    A layer that something else follows (DeBERTa's convolution) takes over nothing.
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
    """Fit the bypasses for `prune(model, plan, ..., bypasses=)` in one forward pass over the data.

    The pass is skipped if the plan removes no whole attention, FFN or layer. In two cases there is no bypass:

    - A norm of its own follows the FFN before its output is added (Gemma 2 and 3, OLMo 2): what is added is not linear in
      the FFN's weights.
    - A norm closes every layer, and the plan removes single attentions or FFNs, or channels of the residual stream, which
      change that norm.

    Args:
        model: the model that is to be pruned; unchanged.
        plan: what stays of it.
        dataloader: batches as for `collect_statistics`; labels are not needed.
        settings: how the pass runs: precision, device, whether it is sharded.

    Returns:
        The bypasses, fitted to all tokens. Each holds (I + H)^2 fp32 numbers.

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
    """Records, batch by batch, the input of an FFN-down linear and what it takes over."""

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
        """Take over the outputs of linears. Where a linear's layer stays, its bias stays too and is not taken over."""

        def hook_of(stays: bool) -> Callable:
            return lambda module, args, output: self._take(
                output - module.bias if stays and module.bias is not None else output
            )

        self.handles += [module.register_forward_hook(hook_of(stays)) for module, stays in linears]

    def watch_norms(self, own: nn.Module, last: nn.Module) -> None:
        """Take over the input of the norm `last` minus the input of the norm `own`."""
        for norm, sign in ((own, -1), (last, 1)):
            hook: Any = lambda module, args, sign=sign: self._take(args[0], sign)  # noqa: E731
            self.handles.append(norm.register_forward_pre_hook(hook))

    def add(self) -> None:
        """Add the batch that has just ended to the moments."""
        assert self.input is not None and isinstance(self.added, torch.Tensor)
        self.moments.add(torch.cat([self.input.float(), self.added], -1).flatten(0, 1), valid=self.state.valid)
        self.input, self.added = None, 0.0

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()


def _closing_norm(model: PreTrainedModel, layer: int, batch: Mapping[str, torch.Tensor]) -> str | None:
    """The path of the norm whose output is the layer's output, or "" if there is none; None if no bypass is possible.

    A bypass needs the FFN's output, or a constant multiple of it, to be added to the input of this norm (or to the layer's
    output). This is measured on the first example of a batch: noise as large as the FFN's output is added to it, and the same
    noise, up to a factor, must arrive there.
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
