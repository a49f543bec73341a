"""Distances between hidden states."""

import torch

from distill_llm.losses.distances import STATE_DISTANCES


def hidden_distance(student: torch.Tensor, teacher: torch.Tensor, distance: str = "mse") -> torch.Tensor:
    """Distance of each token's hidden states.

    Args:
        student: (B, T, H) hidden states.
        teacher: (B, T, H) hidden states, no gradient.
        distance: a name of `distill_llm.losses.distances.STATE_DISTANCES`.

    Returns:
        (B, T) in fp32.
    """
    return STATE_DISTANCES[distance](student, teacher)
