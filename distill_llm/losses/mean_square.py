"""The mean squared difference of states, with two passes forward and one backward."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable


def mean_square(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean over the last dimension of the squared difference, in fp32; the teacher gets no gradient."""
    distances: torch.Tensor = _MeanSquare.apply(student, teacher)
    return distances


class _MeanSquare(torch.autograd.Function):
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
