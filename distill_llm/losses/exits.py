"""The loss of exits: they learn from the labels, from what the deepest head says, and from the state after the last layer."""

from typing import NamedTuple

import torch

from distill_llm.losses.chunked_head import head_losses
from distill_llm.losses.head_parts import Comparison, DivergencePart, LabelPart, Part
from distill_llm.losses.labels import label_loss
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.mean_square import mean_square
from distill_llm.losses.signals import Exits, MixedLabels, TokenExits


class ExitWeights(NamedTuple):
    """The weights of an exit's three losses, and the temperature of the second."""

    labels: float
    logits: float
    hints: float
    temperature: float = 1.0


class ExitTargets(NamedTuple):
    """What exits are held against.

    Attributes:
        logits: (B, C) of the deepest head.
        labels: (B,) class ids, or None where the weight of the labels is 0.
        mixed: where examples are mixtures of two.
        smoothing: of the labels.
    """

    logits: torch.Tensor
    labels: torch.Tensor | None = None
    mixed: MixedLabels | None = None
    smoothing: float = 0.0


def exit_losses(exits: Exits, targets: ExitTargets, weights: ExitWeights) -> torch.Tensor:
    """The loss of each example, a mean over exits (Be Your Own Teacher, Zhang et al., 2019, ICCV).

    Cross-entropy with the label; the KL divergence from the deepest head at a temperature, times its square; and the mean squared
    difference from the first token's state after the last layer. What the deepest head and layer say has no gradient here.

    Returns:
        (B,) in fp32. Every exit's outputs have a gradient, if of zeros, whatever the weights.
    """
    count = exits.logits.shape[1]
    deepest, last = targets.logits.detach().float(), exits.states[:, count].detach().float()
    total = deepest.new_zeros(len(deepest))
    for place in range(count):
        logits = exits.logits[:, place].float()
        taught = logits_divergence(logits, deepest, "forward_kl", weights.temperature)
        hint = mean_square(exits.states[:, place], last)
        total = total + weights.logits * taught + weights.hints * hint
        if targets.labels is not None:
            total = total + weights.labels * _label_losses(logits, targets)
    return total / count


def token_exit_losses(
    exits: TokenExits, labels: torch.Tensor | None, weights: ExitWeights, smoothing: float = 0.0
) -> torch.Tensor:
    """The same for a language model, whose exits all go through its own head; no logits are held whole.

    Args:
        labels: (items,) the next tokens, or None where their weight is 0.

    Returns:
        The sum over items, 0-dim in fp32.
    """
    *early, deepest = exits.states
    last = deepest.detach()
    total = last.new_zeros((), dtype=torch.float32)
    for states in early:
        parts: list[Part] = []
        if labels is not None:
            parts.append(LabelPart(labels, smoothing, weights.labels))
        if weights.logits:
            how = Comparison("forward_kl", temperature=weights.temperature)
            parts.append(DivergencePart(how, exits.head, last, None, weights.logits))
        if parts:
            total = total + head_losses(exits.head, states, parts).total
        total = total + weights.hints * mean_square(states, last.float()).sum()
    return total / len(early)


def _label_losses(logits: torch.Tensor, targets: ExitTargets) -> torch.Tensor:
    assert targets.labels is not None
    losses = label_loss(logits, targets.labels, targets.smoothing)
    if targets.mixed is None:
        return losses
    others = label_loss(logits, targets.mixed.labels, targets.smoothing)
    return losses.lerp(others, 1 - targets.mixed.share)
