"""The divergence of whole logits: temperature, top k, and a function of `distill_llm.losses.divergences`."""

from typing import Any

import torch

from distill_llm.losses.divergences import DIVERGENCES, log_total
from distill_llm.losses.items import values_of_items


def logits_divergence(
    student: torch.Tensor,
    teacher: torch.Tensor,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    *,
    top_k: int | None = None,
    **settings: Any,
) -> torch.Tensor:
    """Divergence of each item times the squared temperature, which keeps the size of gradients (Hinton et al., 2015, section 2).

    Args:
        student: (items, classes) logits.
        teacher: (items, classes) logits, no gradient.
        divergence: a name of DIVERGENCES.
        temperature: above 0; both logits are divided by it.
        top_k: compare the teacher's k likeliest classes, and all others as one (see `coarsened`); None: every class.
        settings: of the divergence; those left out are at its defaults.

    Returns:
        (items,) in fp32, in nats (mse: squared logits; tvd: probability).

    Raises:
        InputError: the divergence returned another shape.
    """
    student, teacher = student.float() / temperature, teacher.float() / temperature
    if top_k is not None and top_k < teacher.shape[-1]:
        student, teacher = coarsened(student, teacher, top_k)
    values = DIVERGENCES[divergence].function(student, teacher, **settings)
    return values_of_items(values, len(student), f"divergence {divergence}") * temperature**2


def coarsened(student: torch.Tensor, teacher: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of k + 1 outcomes: the teacher's k likeliest classes, and any other class.

    Not renormalised over the k classes: that would let the student put any mass outside of them for nothing, and would
    move its probabilities inside away from the teacher's. Merging outcomes can only lower a divergence, so the value is
    a lower bound of the one over all classes and 0 where that is 0.

    Args:
        student, teacher: (items, classes) logits.
        k: below the number of classes.
    """
    best = teacher.topk(k, dim=-1).indices

    def merged(logits: torch.Tensor) -> torch.Tensor:
        # From the others themselves: one minus the sum of the k probabilities has no digits left where they are likely.
        rest = log_total(logits.scatter(-1, best, -torch.inf))
        return torch.cat([logits.gather(-1, best), rest], dim=-1).log_softmax(-1)

    return merged(student), merged(teacher)
