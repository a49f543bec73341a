"""How states of unequal widths are made comparable."""

from typing import Literal

import torch

Adapter = Literal["projection", "interpolation", "shared"]
"""A learned map of each layer pair, interpolation of channels, or one learned map for all pairs."""


def interpolated(states: torch.Tensor, width: int) -> torch.Tensor:
    """(..., width) states of (..., H) ones: channels as points on a line, the first and the last stay where they are.

    What lies between two channels is their mean, each weighted by how near it is. States of that width stay as they are.
    """
    if states.shape[-1] == width:
        return states
    flat = states.reshape(-1, 1, states.shape[-1])
    found = torch.nn.functional.interpolate(flat, size=width, mode="linear", align_corners=True)
    return found.reshape(*states.shape[:-1], width)
