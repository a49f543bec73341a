"""Hooks of a calibration pass: at the inputs of linears, on the residual stream's channels, and around layers.

Their arithmetic is in fp32 whatever the model computes in. Padding does not count.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from distill_llm.pruning.statistics.moments import MomentsSum
from distill_llm.pruning.statistics.unit_sums import UnitSums


class CalibrationBatch:
    """The batch that the hooks are looking at: B examples of R / B rows of T tokens each (one, but for multiple choice).

    Attributes:
        mask: (R, T), 1 where a token is not padding.
        valid: flat indices of these tokens; None where no token is padding.
        before: how many valid tokens all batches before this one had.
        keys: (valid tokens,) random numbers in [0, 1), by which second moments choose tokens.
        channels: (B, C), the effects of the residual stream's channels, summed over the tensors seen so far; a scalar 0 before.
        with_loss: whether there is a backward pass.
    """

    mask: torch.Tensor
    valid: torch.Tensor | None
    before: int
    keys: torch.Tensor
    channels: torch.Tensor

    def __init__(self, device: torch.device, with_loss: bool):
        self.device, self.with_loss = device, with_loss

    def set(self, mask: torch.Tensor, before: int, generator: torch.Generator) -> int:
        """Look at a batch with an attention mask (B, T) or (B, choices, T); returns its number of valid tokens."""
        self.examples, self.before = len(mask), before
        rows = mask.flatten(0, -2)
        places = rows.flatten().nonzero().flatten()
        self.valid = None if len(places) == rows.numel() else places.to(self.device)
        self.mask = rows.to(self.device, torch.float32)
        self.keys = torch.rand(len(places), generator=generator, device=self.device)
        self.channels = torch.zeros((), device=self.device)
        return len(places)

    @property
    def skipped(self) -> bool:
        """Whether no backward pass follows this forward (the first of a checkpointed layer, or a teacher's)."""
        return self.with_loss and not torch.is_grad_enabled()

    def fp32(self) -> torch.autocast:
        """A context in which autocast is off."""
        return torch.autocast(self.device.type, enabled=False)

    def by_token(self, values: torch.Tensor) -> torch.Tensor | None:
        """Values as (R, T, C), given so or as a row per token (OPT's FFN); None if they are not of all tokens."""
        if values.dim() == 3 and values.shape[:2] == self.mask.shape:
            return values
        return values.unflatten(0, self.mask.shape) if values.shape[:-1] == (self.mask.numel(),) else None

    def squares(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over valid tokens of the squares of (R, T, C), or of (R, C): (C,), fp32."""
        return self.per_example(values, values).sum(0)

    def totals(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over valid tokens of (R, T, C): (C,), fp32."""
        return torch.einsum("rt,rtc->c", self.mask, values.float())

    def per_example(self, values: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
        """Sum over valid tokens of values x gradients: both (R, T, C), or (R, C) -> (B, C), fp32."""
        rows = values.float() * gradients.float()
        if rows.dim() == 3:
            rows = torch.bmm(self.mask.unsqueeze(1), rows).squeeze(1)
        return rows if len(rows) == self.examples else rows.unflatten(0, (self.examples, -1)).sum(1)

    def token_weights(self, gradients: torch.Tensor) -> torch.Tensor:
        """(R, T, C) -> (valid tokens, 1): the square of each token's gradient over the mean square of its example."""
        squares = torch.linalg.vector_norm(gradients, dim=-1, dtype=torch.float32).square() * self.mask
        squares = squares.view(self.examples, -1)
        mean = squares.sum(1, keepdim=True) / self.mask.view(self.examples, -1).sum(1, keepdim=True)
        weights = torch.where(mean > 0, squares / mean, 1.0).view(-1, 1)
        return weights if self.valid is None else weights[self.valid]

    def add_moments(self, moments: MomentsSum | None, values: torch.Tensor, gradients: torch.Tensor | None) -> None:
        """Add the valid tokens of (R, T, C) values, or all of (R, C), weighted by their gradients if there are any."""
        if moments is not None:
            weights = None if gradients is None else self.token_weights(gradients)
            flat, valid = (values.flatten(0, 1), self.valid) if values.dim() == 3 else (values, None)
            moments.add(flat, weights, self.keys, self.before, valid)


def begins_here(entering: torch.Tensor) -> torch.Tensor:
    """A tensor with a gradient: `entering` itself, or, if it has none, a leaf in its place, at which the backward pass ends.

    Nothing before the first linears has a statistic, so the backward pass need not go further. (In layers whose attention
    and FFN are side by side, both linears of the first layer are such ends.)
    """
    return entering if entering.requires_grad or not entering.numel() else entering.detach().requires_grad_()


def tap_hook(batch: CalibrationBatch, sums: UnitSums, moments: MomentsSum | None) -> Callable:
    """Before a linear: statistics of its input."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if batch.skipped:
            return None
        entering = args[0]
        value = batch.by_token(entering.detach())
        assert value is not None
        with batch.fp32():
            sums.activation += batch.squares(value)
            sums.total += batch.totals(value)
            if not batch.with_loss:
                batch.add_moments(moments, value, None)
                return None
        entering = begins_here(entering)
        if not entering.requires_grad:  # attention without a head left: zeros of no width
            return None

        def backward(gradient: torch.Tensor) -> None:
            with batch.fp32():
                gradient = gradient.view_as(value)
                sums.add_gradients(batch.per_example(value, gradient))
                batch.add_moments(moments, value, gradient)

        entering.register_hook(backward)
        return (entering, *args[1:])

    return hook


def reader_hook(batch: CalibrationBatch, channels: UnitSums) -> Callable:
    """Before every linear that reads the residual stream: statistics of its channels as they are read, once for each tensor.

    Linears get a branch of the tensor, whose gradient comes through them alone. The gradient of the tensor itself comes from
    everything after it, where it is the residual stream itself (BERT, OLMo 2).
    """
    last: list[torch.Tensor] = []  # the tensor that was read last, and its branch

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if not last or last[0] is not args[0]:
            branch = args[0].view_as(args[0])
            see_channels(batch, channels, branch)
            last[:] = args[0], branch
        return (last[1], *args[1:])

    return hook


def see_channels(batch: CalibrationBatch, channels: UnitSums, tensor: torch.Tensor) -> None:
    """Statistics of the residual stream's channels in a tensor (R, T, C), (R T, C), or (R, C) of one token of each row."""
    value = batch.by_token(tensor.detach())
    if value is None and tensor.shape[:-1] == batch.mask.shape[:1]:
        value = tensor.detach()
    of_tokens = tensor.requires_grad == batch.with_loss  # DeBERTa also reads embeddings of positions
    if batch.skipped or value is None or not of_tokens:
        return
    with batch.fp32():
        channels.activation += batch.squares(value)

    def backward(gradient: torch.Tensor) -> None:
        with batch.fp32():
            batch.channels = batch.channels + batch.per_example(value, gradient.view_as(value))

    if batch.with_loss:
        tensor.register_hook(backward)


def moments_hook(batch: CalibrationBatch, moments: MomentsSum) -> Callable:
    """A function that is shown a tensor of the residual stream's channels at every forward, and adds its second moments."""

    def see(tensor: torch.Tensor) -> None:
        if batch.skipped:
            return
        value = batch.by_token(tensor.detach())
        if value is None:  # of tokens that a head has chosen, or not of tokens: all rows count
            with batch.fp32():
                moments.add(tensor.detach().flatten(0, -2))
        elif not batch.with_loss or not tensor.requires_grad:
            with batch.fp32():
                batch.add_moments(moments, value, None)
        else:
            tensor.register_hook(lambda gradient: _add_within(batch, moments, value, gradient))

    return see


def _add_within(batch: CalibrationBatch, moments: MomentsSum, value: torch.Tensor, gradient: torch.Tensor) -> None:
    with batch.fp32():
        batch.add_moments(moments, value, gradient.view_as(value))


def layer_hook(batch: CalibrationBatch, sums: UnitSums, similarity: torch.Tensor, index: int) -> Callable:
    """After a layer, with kwargs: statistics of what it adds to its input. `similarity[index]` sums the cosines of both."""

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        out = output[0] if isinstance(output, tuple) else output
        if batch.skipped:
            return output
        before = (args[0] if args else kwargs["hidden_states"]).detach()
        after = out.detach()
        with batch.fp32():
            old, new = before.float(), after.float()
            similarity[index] += (nn.functional.cosine_similarity(old, new, dim=-1) * batch.mask).sum()
            change = new - old
            sums.activation += (torch.linalg.vecdot(change, change) * batch.mask).sum()

        def backward(gradient: torch.Tensor) -> None:
            with batch.fp32():
                effect = torch.linalg.vecdot(after.float() - before.float(), gradient.float()) * batch.mask
                sums.add_gradients(effect.view(batch.examples, -1).sum(1, keepdim=True))

        if batch.with_loss:
            out = begins_here(out)  # a first layer without heads and neurons: its biases have an effect, too
            out.register_hook(backward)
        return (out, *output[1:]) if isinstance(output, tuple) else out

    return hook
