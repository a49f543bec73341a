"""The hard concrete distribution: gates in [0, 1] that are exactly 0 or 1 with some probability, and have gradients.

Louizos, Welling and Kingma 2018 (Learning sparse neural networks through L0 regularization), section 2.2.
"""

import math

import torch

BETA, LOW, HIGH = 2 / 3, -0.1, 1.1
"""The temperature, and the ends that the concrete distribution is stretched to, as in the paper's experiments."""
SHIFT = BETA * math.log(-LOW / HIGH)


def gate_of(log_alpha: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The gate that a number in (0, 1) stands for (equations 10 and 11): of uniform numbers, a sample."""
    stretched = torch.sigmoid((uniform.logit() + log_alpha) / BETA) * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def sampled(log_alpha: torch.Tensor) -> torch.Tensor:
    """A sample of every gate, from torch's own random numbers."""
    smallest = torch.finfo(log_alpha.dtype).eps
    return gate_of(log_alpha, torch.empty_like(log_alpha).uniform_(smallest, 1 - smallest))


def open_probability(log_alpha: torch.Tensor) -> torch.Tensor:
    """The probability that a gate is not 0 (equation 12)."""
    return torch.sigmoid(log_alpha - SHIFT)


def settled(log_alpha: torch.Tensor) -> torch.Tensor:
    """The gates of a finished training, without chance (equation 13)."""
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)
