"""Second moments of activations, and the closed-form compensation that uses them."""

from typing import NamedTuple

import torch


class Moments(NamedTuple):
    """Over valid tokens x of C channels: the mean (C,) and the mean of x x^T (C, C), fp32.

    With a loss, a token counts by the norm of the loss's gradient at x over the mean of its example, so that compensation is most
    exact where the loss feels it (in a classifier's last layer only the first token does).
    """

    mean: torch.Tensor
    second: torch.Tensor


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 matrix products are faster than fp32 ones on this device."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class MomentsSum:
    """Sums x and x x^T over tokens.

    The product is in fp32: rounded to bf16 its entries made the least squares fail now and then. To keep it cheap, tokens are
    buffered so that it runs on hundreds of rows at a time, only the blocks of its upper triangle are made, and once there are
    as many tokens as channels, one in four is taken and counts four times.
    """

    rows = 512
    blocks = 4
    stride = 4

    def __init__(self, channels: int, device: torch.device):
        self.sum = torch.zeros(channels, device=device)
        self.second = torch.zeros(channels, channels, device=device)
        self.weight = torch.zeros((), dtype=torch.float64)
        self._tokens = 0
        self._buffer: list[torch.Tensor] = []
        self._waiting = 0

    def add(self, x: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Add tokens x of shape (tokens, C) with weights (tokens, 1); None: all 1."""
        weights = torch.ones(len(x), 1, device=x.device) if weights is None else weights
        if self._tokens >= x.shape[1]:
            x, weights = x[:: self.stride], weights[:: self.stride] * self.stride
        self._tokens += len(x)
        self.weight += weights.sum().item()
        self.sum += (x.float() * weights).sum(0)
        self._buffer.append(x.detach().float() * weights.sqrt())
        self._waiting += len(x)
        if self._waiting >= self.rows:
            self._flush()

    def _flush(self) -> None:
        if not self._buffer:
            return
        x = torch.cat(self._buffer)
        size = -(-x.shape[1] // self.blocks) or 1  # no channels: a module with nothing left
        for start in range(0, x.shape[1], size):
            self.second[start : start + size, start:].addmm_(x[:, start : start + size].T, x[:, start:])
        self._buffer, self._waiting = [], 0

    def tensors(self) -> list[torch.Tensor]:
        """All sums."""
        self._flush()
        return [self.weight, self.sum, self.second]

    def finish(self) -> Moments:
        """The means over all tokens added."""
        self._flush()
        upper = self.second.triu()
        second = upper + upper.triu(1).T
        total = self.weight.item() or 1.0
        return Moments((self.sum / total).cpu(), (second / total).cpu())


def compensate_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, moments: Moments, kept: torch.Tensor, ridge: float = 1e-3
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fold what the removed input columns of a linear contributed into the kept ones and the bias, by least squares.

    With K kept, R removed and S the covariance of the input: W_K + W_R A with A = S_RK (S_KK + lambda I)^-1, and the bias takes
    W_R (mean_R - A mean_K). Without a bias, S is the plain second moment and only the weights change. (Optimal Brain
    Surgeon's update for a whole set of columns, Hassibi and Stork 1993; LLM-Surgeon, van der Ouderaa et al. 2024, section 3.)

    Args:
        weight: (H, C).
        bias: (H,) or None.
        moments: of the linear's input, C channels.
        kept: indices (K,) of the columns that stay.
        ridge: lambda as a share of the mean diagonal of the second moment.

    Returns:
        The new weight (H, K) and bias, in the dtype of the old; computed in fp64.
    """
    w, mean, second = weight.detach().double().cpu(), moments.mean.double(), moments.second.double()
    removed = torch.ones(w.shape[1], dtype=torch.bool)
    removed[kept] = False
    if not removed.any():
        return weight.detach().clone(), None if bias is None else bias.detach().clone()
    s = second if bias is None else second - torch.outer(mean, mean)
    s_kk, s_rk = s[kept][:, kept], s[removed][:, kept]
    damping = ridge * second.diagonal().mean() + torch.finfo(torch.float32).tiny
    damped = s_kk + damping * torch.eye(len(kept), dtype=s.dtype)
    a = torch.linalg.solve(damped, s_rk.T).T if len(kept) else s_rk
    new = (w[:, kept] + w[:, removed] @ a).to(weight)
    if bias is None:
        return new, None
    shift = w[:, removed] @ (mean[removed] - a @ mean[kept])
    return new, (bias.detach().double().cpu() + shift).to(bias)
