"""Distances between hidden states.

A distance takes (B, T, H) states of student and teacher and returns (B, T) in fp32. Each is a function here and a name in
`distill_llm.losses.objective.DISTANCES`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def hidden_distance(student: torch.Tensor, teacher: torch.Tensor, distance: str = "mse") -> torch.Tensor:
    """Distance of each token's hidden states.

    Args:
        student: (B, T, H) hidden states.
        teacher: (B, T, H) hidden states, no gradient.
        distance: the name of a function of this module.

    Returns:
        (B, T) in fp32.
    """
    distances: torch.Tensor = globals()[distance](student, teacher)
    return distances


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over H of the squared difference (TinyBERT, Jiao et al., 2020, section 3.1)."""
    distances: torch.Tensor = _MeanSquare.apply(student, teacher)
    return distances


def cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One minus the cosine of the angle (DistilBERT, Sanh et al., 2019, section 2)."""
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


def normalized_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared difference over the teacher's squared length: 1 is no better than zeros.

    Unlike `mse` it weighs layers and tokens of any scale alike; unlike `cosine`, and the distance of both states at unit
    length (PKD, Sun et al., 2019, section 3.2), it asks for the teacher's length too.
    """
    return mse(student, teacher) / teacher.float().square().mean(-1).clamp(min=torch.finfo(torch.float32).tiny)


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
