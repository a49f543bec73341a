"""Closed-form compensation of a linear for the input columns that it loses."""

import torch

from distill_llm.common.errors import InputError
from distill_llm.pruning.statistics.moments import RIDGE, Moments


def compensate_linear(
    weight: torch.Tensor, bias: torch.Tensor | None, moments: Moments, kept: torch.Tensor, ridge: float = RIDGE
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
        The new weight (H, K) and bias, in the dtype and on the device of the old; computed in fp64.

    Raises:
        InputError: moments with values that are not finite.
    """
    removed = torch.ones(weight.shape[1], dtype=torch.bool)
    removed[kept] = False
    if not removed.any():
        return weight.detach().clone(), None if bias is None else bias.detach().clone()
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device  # which has no fp64
    w, mean, second = (each.detach().to(device, torch.float64) for each in (weight, moments.mean, moments.second))
    kept, gone = kept.to(device), removed.nonzero().squeeze(1).to(device)
    s = second if bias is None else second - torch.outer(mean, mean)
    damping = ridge * second.diagonal().mean() + torch.finfo(torch.float32).tiny
    a = solve(s[kept][:, kept], s[kept][:, gone], damping).T
    new = (w[:, kept] + w[:, gone] @ a).to(weight)
    if bias is None:
        return new, None
    shift = w[:, gone] @ (mean[gone] - a @ mean[kept])
    return new, (bias.detach().to(device, torch.float64) + shift).to(bias)


def solve(s: torch.Tensor, right: torch.Tensor, damping: torch.Tensor) -> torch.Tensor:
    """(S + damping I)^-1 right for a positive semidefinite S (K, K); more damping where rounding left it indefinite."""
    if not (torch.isfinite(s).all() and torch.isfinite(right).all()):
        raise InputError("compensate", "second moments that are not finite", "statistics of finite activations")
    while True:
        factor, failed = torch.linalg.cholesky_ex(s + damping * torch.eye(len(s), dtype=s.dtype, device=s.device))
        if not failed:
            return torch.cholesky_solve(right, factor)
        damping = 10 * damping
