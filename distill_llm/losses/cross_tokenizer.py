"""Comparisons of two models that cut the same text into different tokens."""

from typing import Any

import torch

from distill_llm.losses.divergences import DIVERGENCES, log_total
from distill_llm.losses.items import values_of_items
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.signals import Links

CERTAIN = -1e-5
"""The largest logarithm of a chunk's probability: the gradient of what is left to 1 has no bound beyond."""


def shared_divergence(
    student: torch.Tensor, teacher: torch.Tensor, links: Links, divergence: str, temperature: float, **settings: Any
) -> torch.Tensor:
    """Divergence over the tokens of both vocabularies, and of all other tokens as one outcome, times the squared temperature.

    Merging outcomes can only lower a divergence. Where one of the models has no other tokens, the two are compared over the
    shared ones alone, each distribution over its sum: what the other model says of tokens beyond would be infinitely wrong.

    Args:
        student, teacher: (n, V) and (n, V') logits of the same places in the text.
        links: with the shared tokens.
        divergence: a name of DIVERGENCES that goes with `top_k`.
        settings: of the divergence.

    Returns:
        (n,) in fp32.
    """
    if links.all_shared:
        return logits_divergence(student, teacher, divergence, temperature, **settings)
    beyond = all(size > len(links.shared) for size in links.sizes)
    both = [
        _outcomes(each.float() / temperature, ids, beyond)
        for each, ids in zip((student, teacher), links.shared.unbind(1), strict=True)
    ]
    values = DIVERGENCES[divergence].function(*both, **settings)
    return values_of_items(values, len(student), f"divergence {divergence}") * temperature**2


def _outcomes(logits: torch.Tensor, shared: torch.Tensor, beyond: bool) -> torch.Tensor:
    """Log-probabilities of the shared tokens and, with `beyond`, of any other one."""
    found = logits.index_select(-1, shared)
    if beyond:
        found = torch.cat([found, log_total(logits.index_fill(-1, shared, -torch.inf))], dim=-1)
    return found.log_softmax(-1)


def chunk_log_probabilities(
    logits: torch.Tensor, tokens: torch.Tensor, chunks: torch.Tensor, count: int
) -> torch.Tensor:
    """(count,) logarithms of the probabilities of chunks, each the product over its tokens (chain rule).

    Args:
        logits: (n, V) that predict the tokens.
        tokens: (n,) ids.
        chunks: (n,) the number of each token's chunk.
    """
    found = logits.float().log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
    return found.new_zeros(count).index_add(0, chunks, found)


def chunk_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL of two outcomes, this chunk or any other text, (n,) in nats (approximate likelihood matching, Minixhofer et al., 2025).

    Args:
        student, teacher: (n,) logarithms of a chunk's probability.
        temperature: divides both: long chunks are less likely than any single token.
    """
    own, given = ((each / temperature).clamp(max=CERTAIN) for each in (student, teacher))
    p = given.exp()
    rest = (torch.log(-torch.expm1(each)) for each in (given, own))
    return p * (given - own) + (1 - p) * (next(rest) - next(rest))


def sorted_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Sum of the absolute differences of probabilities, each model's in falling order (ULD, Boizard et al., 2024).

    Args:
        student, teacher: (n, V) and (n, V') logits; the smaller vocabulary is filled up with zeros.

    Returns:
        (n,) in fp32, from 0 to 2.
    """
    both = [each.float().softmax(-1).sort(-1, descending=True).values for each in (student, teacher)]
    most = max(each.shape[-1] for each in both)
    own, given = (torch.nn.functional.pad(each, (0, most - each.shape[-1])) for each in both)
    return (own - given).abs().sum(-1)
