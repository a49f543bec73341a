"""Vectors at unit length."""

import torch


def at_unit_length(vectors: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """Vectors along `dim` over their lengths; one of length 0 stays so, and its slope is 0.

    `torch.nn.functional.normalize` has a slope of 1e12 there, which one pair of equal examples would bring into a step.
    """
    lengths = torch.linalg.vector_norm(vectors, dim=dim, keepdim=True)
    return vectors / lengths.masked_fill(lengths == 0, torch.inf)
