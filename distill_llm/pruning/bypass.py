"""A linear bypass of what is removed whole: an FFN that stays takes over what was added to the residual stream after it.

Let z be the input of its FFN-down linear W and d what the removed attentions and FFNs after it, up to the next FFN that stays,
added to the stream. The new weight is the least squares of W z + d on the neurons that are left: compensation of a linear
whose inputs are z and d, with d removed. Nothing is added to the model. (ReplaceMe, Shopkhoev et al. 2025, fits a matrix
after the FFN in place of removed layers; here each neuron's column is free, and neurons of the same FFN may go at once.)
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.errors import InputError
from distill_llm.losses.items import valid_tokens
from distill_llm.pruning.calibration_loss import calibration_loss
from distill_llm.pruning.families import family_of, layers_of
from distill_llm.pruning.forwarding import frozen
from distill_llm.pruning.moments import RIDGE, Moments, MomentsSum, compensate_linear
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.sharding import process, sum_over_processes
from distill_llm.pruning.structure import linear, sizes_of, weight_of
from distill_llm.pruning.taps import CalibrationBatch

# The attention-output or FFN-down linear of a layer: the layer, and the path in it.
Output = tuple[int, str]


@dataclass(frozen=True)
class Bypasses:
    """What FFNs that stay are to take over, for one model and plan; `bool` says whether there is any.

    Attributes:
        plan: what is removed.
        outputs: the linears whose outputs are taken over.
        moments: by the layer of the FFN that takes over, in the model before: over I + H channels, first the input of its
            FFN-down linear (I), then the sum of the outputs it takes over (H).
    """

    plan: PruningPlan
    outputs: frozenset[Output]
    moments: Mapping[int, Moments]

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
            raise InputError("bypasses", "those of a model of other sizes", "what fit_bypasses found of this model")
        both = torch.cat([weight, torch.eye(outputs, device=weight.device, dtype=weight.dtype)], 1)
        squares = moments.second.diagonal()
        ridge = RIDGE * squares[:inputs].mean() / squares.mean().clamp(min=torch.finfo(squares.dtype).tiny)
        return compensate_linear(both, module.bias, moments, kept, float(ridge))


def outputs_taken_over(model: PreTrainedModel, plan: PruningPlan) -> dict[int, list[Output]]:
    """By layer, for every FFN that stays: what the plan removes whole after it and before the next FFN that stays.

    What is removed before the first such FFN has none to take it over.
    """
    family, rows = family_of(model), {row.source: row for row in plan.layers}
    found: dict[int, list[Output]] = {}
    last: int | None = None
    for layer, size in enumerate(sizes_of(model)):
        row = rows.get(layer)
        gone = [(layer, family.attention_out)] if row is None or (size.queries and not row.heads) else []
        if row is None or (size.neurons and not row.neurons):
            gone.append((layer, family.ffn_out))
        if last is not None and gone:
            found.setdefault(last, []).extend(gone)
        if row is not None and row.neurons:
            last = layer
    return found


@torch.no_grad()
def fit_bypasses(
    model: PreTrainedModel,
    plan: PruningPlan,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    *,
    moment_share: float | None = None,
    precision: torch.dtype | None = None,
    seed: int = 0,
    sharded: bool = False,
) -> Bypasses:
    """One forward pass for what `prune(model, plan, ..., bypasses=)` needs; none where the plan removes nothing whole.

    Where a norm comes between an FFN and the stream (BERT and its kin; Gemma 2 and 3, OLMo 2; OPT-350m) there is no bypass:
    what is added there is not linear in the FFN's weights.

    Args:
        model: the model that is to be pruned; unchanged.
        plan: what stays of it.
        dataloader: batches as for `collect_statistics`; no labels are read.
        moment_share, precision, seed, sharded: as for `collect_statistics`.

    Returns:
        The bypasses; (I + H)^2 fp32 numbers for each FFN that takes over.

    Raises:
        InputError: if the plan does not fit the model, or for a share that is none.
    """
    if moment_share is not None and not 0 < moment_share <= 1:
        raise InputError("moment_share", moment_share, "above 0 and at most 1")
    plan.check(model)
    taken = outputs_taken_over(model, plan)
    batches = iter(dataloader)
    shown = list(islice(batches, 1)) if taken else []
    if not shown or not _adds_to_stream(model, min(taken), shown[0]):
        return Bypasses(plan, frozenset(), {})
    device, layers, family = model.device, layers_of(model), family_of(model)
    state, whole = CalibrationBatch(device, False), set(range(len(layers))) - {row.source for row in plan.layers}
    taps = {layer: _Tap(state, linear(layers[layer], family.ffn_out), moment_share) for layer in taken}
    rank, processes = process() if sharded else (0, 1)
    generator, tokens = torch.Generator(device=device), 0
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for layer, tap in taps.items():
            stack.callback(linear(layers[layer], family.ffn_out).register_forward_pre_hook(tap.see_input).remove)
            for source, path in taken[layer]:
                hook = tap.see_output(bias_stays=source not in whole)
                stack.callback(linear(layers[source], path).register_forward_hook(hook).remove)
        for number, batch in enumerate(chain(shown, batches)):
            mask, before = valid_tokens(batch), tokens
            tokens += int(mask.sum())
            if number % processes != rank:
                continue
            generator.manual_seed((seed + 1) * 1_000_003 + number)  # the same whichever process sees the batch
            state.set(mask, before, generator)
            with torch.autocast(device.type, precision, enabled=precision is not None):
                calibration_loss(model, {k: v.to(device) for k, v in batch.items()}, None, None, generator)
            for tap in taps.values():
                tap.add()
    if sharded:
        sum_over_processes([tensor for tap in taps.values() for tensor in tap.moments.tensors()])
    outputs = frozenset(output for each in taken.values() for output in each)
    return Bypasses(plan, outputs, {layer: tap.moments.finish() for layer, tap in taps.items()})


class _Tap:
    """Of each batch the input of an FFN-down linear beside the sum of the outputs that it takes over."""

    def __init__(self, state: CalibrationBatch, down: nn.Linear | Conv1D, share: float | None):
        outputs, inputs = weight_of(down).shape
        self.state, self.moments = state, MomentsSum(inputs + outputs, state.device, share)
        self.input: torch.Tensor | None = None
        self.added: torch.Tensor | None = None

    def see_input(self, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.input = self.state.by_token(args[0])

    def see_output(self, bias_stays: bool) -> Callable:
        """A hook after a linear; the bias of what is removed from a layer that stays is still added there."""

        def hook(module: Any, args: tuple, output: torch.Tensor) -> None:
            value = self.state.by_token(output if module.bias is None or not bias_stays else output - module.bias)
            assert value is not None
            self.added = value.float() if self.added is None else self.added + value

        return hook

    def add(self) -> None:
        """The batch is over."""
        assert self.input is not None and self.added is not None
        self.state.add_moments(self.moments, torch.cat([self.input.float(), self.added], -1), None)
        self.input = self.added = None


def _adds_to_stream(model: PreTrainedModel, layer: int, batch: Mapping[str, torch.Tensor]) -> bool:
    """Whether what a layer's FFN gives out is added to its output as it is, or times a constant, with no norm after it.

    Measured on a batch's first example: what is added to the FFN's output, in alternating sizes, comes out of the layer alike.
    """
    seen: list[torch.Tensor] = []
    pushes: list[torch.Tensor] = []

    def push(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        if not seen:
            return None
        noise = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0)).to(seen[0].device)
        noise[::2] *= 4
        pushes.append(noise * seen[0].std())
        return output + pushes[0].view_as(output).to(output.dtype)

    def see(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2).float())

    block, first = layers_of(model)[layer], {k: v[:1].to(model.device) for k, v in batch.items()}
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.callback(linear(block, family_of(model).ffn_out).register_forward_hook(push).remove)
        stack.callback(block.register_forward_hook(see).remove)
        for _ in range(2):
            calibration_loss(model, first, None, None, torch.Generator())
    change = (seen[1] - seen[0]).flatten()
    return bool(nn.functional.cosine_similarity(change, pushes[0].flatten(), dim=0) > 0.99)
