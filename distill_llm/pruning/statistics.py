"""One pass over calibration data that collects every statistic of every head, neuron and layer.

Weights are frozen; hooks on the attention-output and FFN-down linears see their inputs a and, through the backward pass, the
gradients g of the loss there. Padding counts in nothing (`attention_mask`).
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from distill_llm.capture import item_logits, packed
from distill_llm.errors import InputError
from distill_llm.losses.terms import per_token
from distill_llm.pruning.fast_backward import fast_backward
from distill_llm.pruning.modeling_pruned import family_of, layers_of
from distill_llm.pruning.moments import Moments, MomentsSum
from distill_llm.pruning.structure import head_size_of, linear, weight_norms

Loss = str | Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class UnitStatistics:
    """Sums over the calibration data, a value per unit.

    Attributes:
        taylor: over examples, |sum over tokens of a g|.
        fisher: over examples, (sum over tokens of a g)^2.
        activation: over tokens, a^2.
        magnitude: squared weights (no data).
    """

    taylor: torch.Tensor
    fisher: torch.Tensor
    activation: torch.Tensor
    magnitude: torch.Tensor


@dataclass(frozen=True)
class Statistics:
    """What one pass found. `heads` and `neurons` hold a row per layer, `layers` a value per layer.

    Attributes:
        similarity: per layer, the sum over tokens of the cosine between its input and output.
        moments: per layer, weighted first and second moments of the inputs of the attention-output and FFN-down linears; empty if
            they were not asked for.
        examples, tokens: how many were seen, padding left out.
        has_gradients: whether a loss was given.
    """

    heads: tuple[UnitStatistics, ...]
    neurons: tuple[UnitStatistics, ...]
    layers: UnitStatistics
    similarity: torch.Tensor
    moments: tuple[tuple[Moments, Moments], ...]
    examples: int
    tokens: int
    has_gradients: bool

    def save(self, path: str | os.PathLike) -> None:
        """Write as safetensors."""
        tensors = {"similarity": self.similarity}
        for kind, rows in (("heads", self.heads), ("neurons", self.neurons), ("layers", (self.layers,))):
            for i, row in enumerate(rows):
                tensors.update({f"{kind}.{i}.{f.name}": getattr(row, f.name) for f in fields(UnitStatistics)})
        for i, pair in enumerate(self.moments):
            for kind, moments in zip(("attention", "ffn"), pair, strict=True):
                tensors[f"moments.{i}.{kind}.mean"], tensors[f"moments.{i}.{kind}.second"] = moments
        metadata = {name: str(int(getattr(self, name))) for name in ("examples", "tokens", "has_gradients")}
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Statistics":
        """Read what `save` wrote."""
        with safe_open(path, "pt") as file:
            names, get, meta = set(file.keys()), file.get_tensor, file.metadata()

            def units(kind: str) -> tuple[UnitStatistics, ...]:
                count = sum(name.startswith(f"{kind}.") and name.endswith(".taylor") for name in names)
                return tuple(
                    UnitStatistics(*(get(f"{kind}.{i}.{f.name}") for f in fields(UnitStatistics))) for i in range(count)
                )

            count = sum(name.endswith(".ffn.mean") for name in names)
            moments = tuple(
                (
                    Moments(get(f"moments.{i}.attention.mean"), get(f"moments.{i}.attention.second")),
                    Moments(get(f"moments.{i}.ffn.mean"), get(f"moments.{i}.ffn.second")),
                )
                for i in range(count)
            )
            return cls(
                units("heads"),
                units("neurons"),
                units("layers")[0],
                get("similarity"),
                moments,
                int(meta["examples"]),
                int(meta["tokens"]),
                bool(int(meta["has_gradients"])),
            )


class _Sums:
    """Running sums of one tap: the input of an output linear (C channels), or what a layer adds to its input."""

    def __init__(self, channels: int, unit_size: int, device: torch.device):
        self.unit_size = unit_size
        self.activation = torch.zeros(channels // unit_size, device=device)
        self.taylor, self.fisher = torch.zeros_like(self.activation), torch.zeros_like(self.activation)

    def units(self, per_channel: torch.Tensor) -> torch.Tensor:
        return per_channel.unflatten(-1, (len(self.activation), self.unit_size)).sum(-1)

    def add_gradients(self, per_example: torch.Tensor) -> None:
        """(B, C): sums over valid tokens of a g."""
        effect = self.units(per_example)
        self.taylor += effect.abs().sum(0)
        self.fisher += effect.square().sum(0)


def collect_statistics(
    model: PreTrainedModel,
    dataloader: Iterable[Mapping[str, torch.Tensor]],
    loss: Loss | None = "labels",
    teacher: PreTrainedModel | None = None,
    *,
    moments: bool = True,
    exact: bool = False,
    seed: int = 0,
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
        exact: keep the backward products in the model's precision. Otherwise those of fp32 linears run in bf16 where the
            device is faster at it; ranks hardly move (see `fast_backward`).
        seed: of the labels drawn for loss "kl".

    Raises:
        InputError: for another `loss`, or batches without labels where they are needed.
    """
    if isinstance(loss, str) and loss not in ("labels", "kl"):
        raise InputError("loss", loss, "labels, kl, a callable (outputs, batch) -> tensor, or None")
    family, layers, head_size, device = family_of(model), layers_of(model), head_size_of(model), model.device
    norms = weight_norms(model)
    taps = [
        (linear(layer, path), size)
        for layer in layers
        for path, size in ((family.attention_out, head_size), (family.ffn_out, 1))
    ]
    sums = [_Sums(module.in_features, size, device) for module, size in taps]
    second = [MomentsSum(module.in_features, device) for module, _ in taps] if moments else []
    layer_sums = [_Sums(1, 1, device) for _ in layers]
    similarity = torch.zeros(len(layers), device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    state = _Batch()
    examples = tokens = 0

    with ExitStack() as stack:
        stack.enter_context(_frozen(model))
        for i, (module, _) in enumerate(taps):
            first = i == 0 and loss is not None
            hook = _tap_hook(state, sums[i], second[i] if second else None, loss is not None, first)
            stack.callback(module.register_forward_pre_hook(hook).remove)
        if loss is not None and not exact:
            stack.enter_context(fast_backward(layers))
        for i, layer in enumerate(layers):
            hook = _layer_hook(state, layer_sums[i], similarity, i, loss is not None)
            stack.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
        for batch in dataloader:
            batch = {k: v.to(device) for k, v in batch.items()}
            mask = batch.get("attention_mask")
            state.set(mask if mask is not None else torch.ones_like(batch["input_ids"]))
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            positions = _positions(model, batch, loss)
            with torch.set_grad_enabled(loss is not None), packed(model, positions):
                outputs = model(**inputs)
                if loss is not None:
                    _loss(outputs, batch, inputs, positions, loss, teacher, generator).backward()
            examples += len(batch["input_ids"])
            tokens += int(state.mask.sum())

    collected = [each.finish() for each in second]

    def finish(total: _Sums, magnitude: torch.Tensor) -> UnitStatistics:
        return UnitStatistics(total.taylor.cpu(), total.fisher.cpu(), total.activation.cpu(), magnitude.cpu())

    return Statistics(
        heads=tuple(finish(s, n[0]) for s, n in zip(sums[0::2], norms, strict=True)),
        neurons=tuple(finish(s, n[1]) for s, n in zip(sums[1::2], norms, strict=True)),
        layers=UnitStatistics(
            torch.cat([s.taylor for s in layer_sums]).cpu(),
            torch.cat([s.fisher for s in layer_sums]).cpu(),
            torch.cat([s.activation for s in layer_sums]).cpu(),
            torch.stack([n[0].sum() + n[1].sum() for n in norms]).cpu(),
        ),
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

    def set(self, mask: torch.Tensor) -> None:
        self.mask = mask
        flat = mask.flatten()
        self.valid = None if bool(flat.all()) else flat.nonzero().flatten()

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


def _tap_hook(state: _Batch, sums: _Sums, moments: MomentsSum | None, gradients: bool, first: bool) -> Callable:
    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        entering = args[0]
        value = entering.detach()
        packed = state.pack(value)
        sums.activation += sums.units(torch.linalg.vector_norm(packed, dim=0, dtype=torch.float32).square())
        if not gradients:
            if moments is not None:
                moments.add(packed)
            return None
        if first:  # the backward pass ends here: nothing before the first tap has a statistic
            entering = entering.detach().requires_grad_()
        elif not entering.requires_grad:  # attention without a head left: zeros of no width
            return None

        def backward(gradient: torch.Tensor) -> None:
            sums.add_gradients(state.per_example(value, gradient))
            if moments is not None:
                moments.add(packed, state.token_weights(gradient))

        entering.register_hook(backward)
        return (entering, *args[1:])

    return hook


def _layer_hook(state: _Batch, sums: _Sums, similarity: torch.Tensor, index: int, gradients: bool) -> Callable:
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).detach()
        out = output[0] if isinstance(output, tuple) else output
        after = out.detach()
        cosine = torch.nn.functional.cosine_similarity(state.pack(before).float(), state.pack(after).float(), dim=-1)
        similarity[index] += cosine.sum()
        added = after - before
        sums.activation += state.pack(added).float().square().sum()
        if gradients:
            out.register_hook(lambda g: sums.add_gradients(state.per_example(added, g).sum(1, keepdim=True)))

    return hook


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


def _positions(model: PreTrainedModel, batch: Mapping[str, torch.Tensor], loss: Loss | None) -> torch.Tensor | None:
    """Flat positions of the tokens whose outputs the loss is over; None for one output per example, or a loss of the caller's."""
    if loss is None or callable(loss) or not per_token(model):
        return None
    chosen = batch["attention_mask"].bool()
    if loss == "labels" and "labels" in batch:
        chosen = chosen & (batch["labels"] != -100)
    return chosen.flatten().nonzero().squeeze(-1)


def _loss(
    outputs: Any,
    batch: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    positions: torch.Tensor | None,
    loss: Loss,
    teacher: PreTrainedModel | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """The sum over examples of their losses, fp32."""
    if callable(loss):
        return loss(outputs, batch)
    logits = item_logits(outputs.logits, positions).float()
    regression = logits.shape[-1] == 1
    if loss == "kl" and teacher is not None:
        with torch.no_grad(), packed(teacher, positions):
            target = item_logits(teacher(**inputs).logits, positions).float()
        if regression:
            return nn.functional.mse_loss(logits, target, reduction="sum")
        return nn.functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
    if loss == "kl":
        predicted = logits.detach()
        if regression:
            labels = predicted + torch.randn(predicted.shape, generator=generator, device=logits.device)
        else:
            labels = torch.multinomial(predicted.softmax(-1), 1, generator=generator).squeeze(-1)
    elif "labels" not in batch:
        raise InputError("dataloader", sorted(batch), "batches with labels, or loss='kl'")
    else:
        labels = batch["labels"] if positions is None else batch["labels"].flatten()[positions]
    if regression:
        return nn.functional.mse_loss(logits.flatten(), labels.float().flatten(), reduction="sum")
    return nn.functional.cross_entropy(logits, labels, reduction="sum")
