"""Distances between hidden states."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def hidden_distance(student: torch.Tensor, teacher: torch.Tensor, distance: str = "mse") -> torch.Tensor:
    """Distance of each token's hidden states.

    Args:
        student: (B, T, H) hidden states.
        teacher: (B, T, H) hidden states, no gradient.
        distance: `mse`, the mean over H of the squared difference (TinyBERT, Jiao et al., 2020), or `cosine`, one minus
            the cosine of the angle (DistilBERT, Sanh et al., 2019).

    Returns:
        (B, T) in fp32.
    """
    if distance == "cosine":
        return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    distances: torch.Tensor = _MeanSquare.apply(student, teacher)
    return distances


class _MeanSquare(torch.autograd.Function):
    """Mean over the last dimension of the squared difference, with two passes forward and one backward."""

    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        difference = student.float() - teacher
        ctx.save_for_backward(difference)
        ctx.dtype = student.dtype
        return torch.linalg.vecdot(difference, difference) / difference.shape[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (difference,) = ctx.saved_tensors
        slope = difference * (gradient * (2 / difference.shape[-1])).unsqueeze(-1)
        return slope.to(ctx.dtype), None
