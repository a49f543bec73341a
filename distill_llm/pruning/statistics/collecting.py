"""One pass over calibration data that collects every statistic of every unit.

Weights are frozen; hooks on the attention-output and FFN-down linears see their inputs a and, through the backward pass, the
gradients g of the loss there; hooks on the linears that read the residual stream, and on its last norm, do the same for its
channels. Padding counts in nothing (`attention_mask`).
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of, layers_of, width_of
from distill_llm.common.errors import InputError
from distill_llm.pruning.statistics.calibration_loss import Loss
from distill_llm.pruning.statistics.calibration_pass import CalibrationPass, first_of
from distill_llm.pruning.statistics.hooks import (
    layer_hook,
    moments_hook,
    reader_hook,
    see_channels,
    tap_hook,
)
from distill_llm.pruning.statistics.magnitudes import unit_weights
from distill_llm.pruning.statistics.moments import MomentsSum
from distill_llm.pruning.statistics.processes import sum_over_processes
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.statistics.unit_sums import UnitSums, stacked
from distill_llm.pruning.units.sizes import counts_of, head_size_of, linear, weight_of
from distill_llm.pruning.units.stream import channel_readers, seen, stream_readers, stream_tensors


def collect_statistics(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    loss: Loss | None = "labels",
    teacher: PreTrainedModel | None = None,
    *,
    moments: bool = True,
    moment_share: float | None = None,
    hidden: bool = True,
    hidden_moments: bool = False,
    exact: bool = False,
    precision: torch.dtype | None = None,
    checkpointing: bool = False,
    seed: int = 0,
    sharded: bool = False,
    device: torch.device | str | None = None,
) -> Statistics:
    """One pass over the data; the model is unchanged, its mode and flags are restored.

    Args:
        model: a model of a family with a row.
        dataloader: batches with `input_ids` and `attention_mask` of shape (B, T), of multiple choice (B, choices, T); for loss
            "labels" with `labels`, for question answering `start_positions` and `end_positions` (B,).
        loss: "labels" for the task's loss; "kl" for the divergence from `teacher`, or, with no teacher, from the model itself:
            its gradient there is zero and its curvature is the Fisher information with labels drawn from the model's own
            predictions, which is what is used (no labels needed); a callable (outputs, batch) -> the sum over examples of
            their losses; None for no backward pass (criteria without gradients).
        teacher: only for loss "kl".
        moments: also collect the second moments that compensation needs.
        moment_share: share of the tokens with a gradient that second moments are of, drawn at random and counted by its
            inverse; None: all until there are half as many as channels, then one in four. All take about half a forward
            pass more.
        hidden: also collect statistics of the residual stream's channels.
        hidden_moments: also collect the second moments that compensation of its channels needs: for each tensor that a norm
            of the stream gives out or linears read, as many fp32 numbers as channels squared.
        exact: keep the backward products in the model's precision. Otherwise those of fp32 linears run in bf16 where the
            device is faster at it; ranks hardly move (see `fast_backward`).
        precision: run the forward pass under autocast in this dtype, and so the backward pass; sums are in fp32.
        checkpointing: hold the activations of one layer at a time, for models of which all do not fit. The layers' forward runs
            twice: about one more forward pass in time. Without a loss nothing is held anyway.
        seed: of the labels drawn for loss "kl", and of the tokens drawn for second moments.
        device: compute there with the weights of one layer at a time, while the model stays where it is: for models that do not
            fit there once. With a loss it needs `checkpointing`. None: where the model is.
        sharded: on several processes, take this process's part of the batches (each gives all, in the same order) and add up
            the sums of all processes: each ends with what one process alone would find, but for rounding.

    Raises:
        InputError: for another `loss` or share, a model that is offloaded or spread over devices, or batches without labels
            where they are needed.
    """
    if moment_share is not None and not 0 < moment_share <= 1:
        raise InputError("moment_share", moment_share, "above 0 and at most 1")
    at = None if device is None else torch.device(device)
    calibration = CalibrationPass(model, loss, teacher, exact, precision, checkpointing, seed, sharded, at)
    family, layers, head_size, device = family_of(model), layers_of(model), head_size_of(model), calibration.at
    taps = [linear(layer, path) for layer in layers for path in (family.attention_out, family.ffn_out)]
    sums: list[UnitSums] = []
    for has, out, down in zip(counts_of(model), taps[0::2], taps[1::2], strict=True):
        shared = has["queries"] // has["heads"] if has["heads"] else 1
        sums += [UnitSums([out], (head_size, head_size * shared), device), UnitSums([down], (1,), device)]
    second = [MomentsSum(weight_of(module).shape[1], device, moment_share) for module in taps] if moments else []
    layer_sums = [UnitSums([], (1,), device) for _ in layers]
    readers = list(stream_readers(model).values())
    channels = UnitSums(readers, (1,), device, width_of(model)) if hidden else None
    similarity = torch.zeros(len(layers), device=device)
    shown, batches = first_of(dataloader)  # on every process, whoever collects of it
    found = stream_tensors(model, shown) if hidden_moments and shown is not None else []
    inside, after = channel_readers(model, shown) if hidden and shown is not None else ([], [])
    stream = {tensor: MomentsSum(width_of(model), device, moment_share) for tensor in found}
    state = calibration.batch()

    def add_channels() -> None:
        if channels is not None and loss is not None:
            channels.add_gradients(state.channels)

    with ExitStack() as stack:
        # Gradients of all channels, or of what every layer reads, go back to the very embeddings.
        from_embeddings = hidden or hidden_moments or checkpointing
        stack.enter_context(calibration.prepared(from_embeddings))
        for i, module in enumerate(taps):
            hook = tap_hook(state, sums[i], second[i] if second else None)
            stack.enter_context(module.register_forward_pre_hook(hook))
        if channels is not None:
            before = reader_hook(state, channels)
            for reader in inside:
                stack.enter_context(reader.register_forward_pre_hook(before))
            for tensor in after:
                stack.enter_context(seen(model, tensor, partial(see_channels, state, channels)))
        for tensor, its in stream.items():
            stack.enter_context(seen(model, tensor, moments_hook(state, its)))
        for i, layer in enumerate(layers):
            of_layer = layer_hook(state, layer_sums[i], similarity, i)
            stack.enter_context(layer.register_forward_hook(of_layer, with_kwargs=True))
        examples, tokens = calibration.over(batches, state, add_channels)

    if sharded:
        parts: list[UnitSums | MomentsSum] = [
            *sums,
            *layer_sums,
            *([channels] if channels is not None else []),
            *second,
            *stream.values(),
        ]
        sum_over_processes([similarity, *(tensor for part in parts for tensor in part.tensors())])
    weights = unit_weights(model, hidden=hidden)
    second.reverse()
    collected = [second.pop().finish() for _ in range(len(second))]  # each is freed before the next is made
    pairs = list(zip(sums[0::2], sums[1::2], weights.layers, strict=True))
    whole = [[(w["heads"][i].sum() + w["neurons"][i].sum())[None] for i in (0, 1)] for w in weights.layers]
    return Statistics(
        heads=tuple(s.finish(-1, *w["heads"]) for s, _, w in pairs),
        neurons=tuple(s.finish(0, *w["neurons"]) for _, s, w in pairs),
        queries=tuple(s.finish(0, *w["queries"]) for s, _, w in pairs),
        layers=stacked([s.finish(0, *w) for s, w in zip(layer_sums, whole, strict=True)]),
        attention=stacked([s.block(*w["heads"]) for s, _, w in pairs]),
        ffn=stacked([s.block(*w["neurons"]) for _, s, w in pairs]),
        hidden=(channels or UnitSums([], (1,), device, 0)).finish(0, *weights.hidden),
        similarity=similarity.cpu(),
        moments=tuple(zip(collected[0::2], collected[1::2], strict=True)),
        examples=examples,
        tokens=tokens,
        has_gradients=loss is not None,
        hidden_moments=tuple((tensor, its.finish()) for tensor, its in stream.items()),
    )
