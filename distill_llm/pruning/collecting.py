"""One pass over calibration data that collects every statistic of every unit.

Weights are frozen; hooks on the attention-output and FFN-down linears see their inputs a and, through the backward pass, the
gradients g of the loss there; hooks on the norms of the residual stream do the same for its channels. Padding counts in
nothing (`attention_mask`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.errors import InputError
from distill_llm.pruning.calibration_loss import Loss, run
from distill_llm.pruning.families import family_of, layers_of, width_of
from distill_llm.pruning.fast_backward import fast_backward
from distill_llm.pruning.modeling_pruned import hidden_dims
from distill_llm.pruning.moments import MomentsSum
from distill_llm.pruning.statistics import Statistics
from distill_llm.pruning.structure import head_size_of, linear, sizes_of, weight_of
from distill_llm.pruning.unit_sums import UnitSums, stacked
from distill_llm.pruning.weights import unit_weights


def collect_statistics(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    loss: Loss | None = "labels",
    teacher: PreTrainedModel | None = None,
    *,
    moments: bool = True,
    hidden: bool = True,
    exact: bool = False,
    precision: torch.dtype | None = None,
    seed: int = 0,
    reduce: Callable[[list[torch.Tensor]], None] | None = None,
) -> Statistics:
    """One pass over the data; the model is unchanged, its mode and flags are restored.

    Args:
        model: a model of a family with a row.
        dataloader: batches with `input_ids` and `attention_mask` of shape (B, T), and `labels` for loss "labels".
        loss: "labels" for the task's loss; "kl" for the divergence from `teacher`, or, with no teacher, from the model itself:
            its gradient there is zero and its curvature is the Fisher information with labels drawn from the model's own
            predictions, which is what is used (no labels needed); a callable (outputs, batch) -> the sum over examples of
            their losses; None for no backward pass (criteria without gradients).
        teacher: only for loss "kl".
        moments: also collect the second moments that compensation needs.
        hidden: also collect statistics of the residual stream's channels.
        exact: keep the backward products in the model's precision. Otherwise those of fp32 linears run in bf16 where the
            device is faster at it; ranks hardly move (see `fast_backward`).
        precision: run both passes under autocast in this dtype; sums stay in fp32.
        seed: of the labels drawn for loss "kl".
        reduce: adds up sums in place over processes that each see a part of the data (`sharding.sum_over_processes`).

    Raises:
        InputError: for another `loss`, or batches without labels where they are needed.
    """
    if isinstance(loss, str) and loss not in ("labels", "kl"):
        raise InputError("loss", loss, "labels, kl, a callable (outputs, batch) -> tensor, or None")
    family, layers, head_size, device = family_of(model), layers_of(model), head_size_of(model), model.device
    taps = [linear(layer, path) for layer in layers for path in (family.attention_out, family.ffn_out)]
    sums: list[UnitSums] = []
    for size, out, down in zip(sizes_of(model), taps[0::2], taps[1::2], strict=True):
        shared = size.queries // size.groups if size.groups else 1
        sums += [UnitSums(out, (head_size, head_size * shared)), UnitSums(down, (1,))]
    second = [MomentsSum(weight_of(module).shape[1], device) for module in taps] if moments else []
    layer_sums = [UnitSums(None, (1,), device) for _ in layers]
    channels = UnitSums(None, (1,), device, width_of(model)) if hidden else None
    similarity = torch.zeros(len(layers), device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    state = _Batch()
    examples = tokens = 0

    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        for i, module in enumerate(taps):
            first = i == 0 and loss is not None and not hidden
            hook = _tap_hook(state, sums[i], second[i] if second else None, loss is not None, first)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        if channels is not None:
            if loss is not None:  # gradients of all channels: the backward pass goes to the very embeddings
                begin = model.get_input_embeddings().register_forward_hook(lambda m, a, o: o.detach().requires_grad_())
                stack.callback(begin.remove)
            for norm in _norms(model):
                stack.callback(norm.register_forward_hook(_norm_hook(state, channels, loss is not None)).remove)
        if loss is not None and not exact and precision is None:
            stack.enter_context(fast_backward(layers))
        for i, layer in enumerate(layers):
            hook = _layer_hook(state, layer_sums[i], similarity, i, loss is not None)
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in dataloader:
            batch = {k: v.to(device) for k, v in batch.items()}
            mask = batch.get("attention_mask")
            state.set(mask if mask is not None else torch.ones_like(batch["input_ids"]))
            autocast = torch.autocast(device.type, precision, enabled=precision is not None)
            with torch.set_grad_enabled(loss is not None), autocast:
                run(model, batch, loss, teacher, generator)
            if channels is not None and loss is not None:
                channels.add_gradients(state.channels)
            examples += len(batch["input_ids"])
            tokens += int(state.mask.sum())

    if reduce is not None:
        counts = torch.tensor([examples, tokens], dtype=torch.float64)
        parts: list[UnitSums | MomentsSum] = [
            *sums,
            *layer_sums,
            *([channels] if channels is not None else []),
            *second,
        ]
        reduce([counts, similarity, *(tensor for part in parts for tensor in part.tensors())])
        examples, tokens = (int(count) for count in counts.tolist())
    weights = unit_weights(model, hidden=hidden)
    collected = [each.finish() for each in second]
    pairs = list(zip(sums[0::2], sums[1::2], weights.layers, strict=True))
    whole = [[(w["heads"][i].sum() + w["neurons"][i].sum())[None] for i in (0, 1)] for w in weights.layers]
    return Statistics(
        heads=tuple(s.finish(-1, *w["heads"]) for s, _, w in pairs),
        neurons=tuple(s.finish(0, *w["neurons"]) for _, s, w in pairs),
        queries=tuple(s.finish(0, *w["queries"]) for s, _, w in pairs),
        layers=stacked([s.finish(0, *w) for s, w in zip(layer_sums, whole, strict=True)]),
        attention=stacked([s.block(*w["heads"]) for s, _, w in pairs]),
        ffn=stacked([s.block(*w["neurons"]) for _, s, w in pairs]),
        hidden=(channels or UnitSums(None, (1,), device, 0)).finish(0, *weights.hidden),
        similarity=similarity.cpu(),
        moments=tuple(zip(collected[0::2], collected[1::2], strict=True)),
        examples=examples,
        tokens=tokens,
        has_gradients=loss is not None,
    )


class _Batch:
    """The batch that the hooks are looking at: its mask (B, T), and the flat indices of valid tokens if any is padding."""

    mask: torch.Tensor
    valid: torch.Tensor | None
    channels: torch.Tensor

    def set(self, mask: torch.Tensor) -> None:
        self.mask = mask
        flat = mask.flatten()
        self.valid = None if bool(flat.all()) else flat.nonzero().flatten()
        self.channels = torch.zeros((), device=mask.device)

    def pack(self, values: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (valid tokens, C)."""
        flat = values.flatten(0, 1)
        return flat if self.valid is None else flat[self.valid]

    def per_example(self, values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Sum over valid tokens of values x gradients: (B, T, C), (B, T, C) -> (B, C), fp32."""
        product = (values * gradients).float()
        return torch.bmm(self.mask.unsqueeze(1).to(product.dtype), product).squeeze(1)

    def token_weights(self, gradients: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (valid tokens, 1): the norm of each token's gradient over the mean of its example."""
        norms = torch.linalg.vector_norm(gradients, dim=-1, dtype=torch.float32) * self.mask
        mean = norms.sum(1, keepdim=True) / self.mask.sum(1, keepdim=True)
        return self.pack(torch.where(mean > 0, norms / mean, 1.0).unsqueeze(-1))


def _squares(packed_values: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(packed_values, dim=0, dtype=torch.float32).square()


def _tap_hook(state: _Batch, sums: UnitSums, moments: MomentsSum | None, gradients: bool, first: bool) -> Callable:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        entering = args[0]
        value = entering.detach()
        sums.activation += _squares(state.pack(value))
        if not gradients:
            if moments is not None:
                moments.add(state.pack(value))
            return None
        if first:  # the backward pass ends here: nothing before the first tap has a statistic
            entering = entering.detach().requires_grad_()
        elif not entering.requires_grad:  # attention without a head left: zeros of no width
            return None

        def backward(gradient: torch.Tensor) -> None:
            sums.add_gradients(state.per_example(value, gradient))
            if moments is not None:
                moments.add(state.pack(value), state.token_weights(gradient))

        entering.register_hook(backward)
        return (entering, *args[1:])

    return hook


def _norm_hook(state: _Batch, channels: UnitSums, gradients: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        value = output.detach()
        if value.shape[:2] != state.mask.shape:  # a head on chosen tokens: not the stream itself
            return
        channels.activation += _squares(state.pack(value))

        def backward(gradient: torch.Tensor) -> None:
            state.channels = state.channels + state.per_example(value, gradient)

        if gradients and output.requires_grad:
            output.register_hook(backward)

    return hook


def _layer_hook(state: _Batch, sums: UnitSums, similarity: torch.Tensor, index: int, gradients: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).detach()
        out = output[0] if isinstance(output, tuple) else output
        after = out.detach()
        cosine = nn.functional.cosine_similarity(state.pack(before).float(), state.pack(after).float(), dim=-1)
        similarity[index] += cosine.sum()
        added = after - before
        sums.activation += state.pack(added).float().square().sum()
        if gradients:
            out.register_hook(lambda g: sums.add_gradients(state.per_example(added, g).sum(1, keepdim=True)))

    return hook


def _norms(model: PreTrainedModel) -> list[nn.Module]:
    """The norms over the residual stream."""
    found = []
    for name in hidden_dims(model):
        path, _, last = name.rpartition(".")
        if last == "weight" and "Norm" in type(module := model.get_submodule(path)).__name__:
            found.append(module)
    return found


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode, no gradient for any weight; both restored."""
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        for parameter, flag in zip(model.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
