"""Distances between hidden states."""

import torch
import torch.nn.functional as F


def hidden_distance(student: torch.Tensor, teacher: torch.Tensor, distance: str = "mse") -> torch.Tensor:
    """Distance of each token's hidden states.

    Args:
        student: (B, T, H) hidden states.
        teacher: (B, T, H) hidden states, no gradient.
        distance: `mse`, the mean over H of the squared difference (TinyBERT, Jiao et al., 2020), or `cosine`, one minus the
            cosine of the angle (DistilBERT, Sanh et al., 2019).

    Returns:
        (B, T) in fp32.
    """
    if distance == "cosine":
        return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)
    return (student.float() - teacher.float()).square().mean(-1)
