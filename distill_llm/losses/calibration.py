"""How far a model's probabilities can be trusted."""

import torch
from torch.nn.functional import cross_entropy

HALVINGS = 60
LOWEST, HIGHEST = -5.0, 5.0
"""Natural logarithms of the temperatures among which the best is looked for."""


def calibrating_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature at which a model's outputs on held-out rows have the largest likelihood (Guo et al., 2017).

    The likelihood has one maximum in 1 / temperature, where its derivative changes sign; halving finds it.

    Args:
        logits: (N, C).
        labels: (N,) class ids.

    Returns:
        Between e^-5 and e^5: one of these ends where the largest likelihood is beyond it.
    """
    logits = logits.detach().double()
    low, high = LOWEST, HIGHEST
    for _ in range(HALVINGS):
        middle = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        loss = cross_entropy(logits / middle.exp(), labels)
        (slope,) = torch.autograd.grad(loss, middle)
        low, high = ((low + high) / 2, high) if slope < 0 else (low, (low + high) / 2)
    return float(torch.tensor((low + high) / 2).exp())
