"""Divergences between the teacher's and the student's output distributions.

A divergence takes the student's and the teacher's logits, (items, classes) in fp32 and over the temperature already, and
its own settings by name; it returns (items,) values. p is the teacher's distribution, q the student's. Each is a function
here and a row of `distill_llm.losses.objective.DIVERGENCES`, which says by what settings it is called.
"""

import math
from typing import Any

import torch

from distill_llm.losses.labels import IGNORED


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
        divergence: the name of a function of this module.
        temperature: above 0; both logits are divided by it.
        top_k: compare the teacher's k likeliest classes, and all others as one (see `coarsened`); None: every class.
        settings: of the divergence; those left out are at its defaults.

    Returns:
        (items,) in fp32, in nats (mse: squared logits; tvd: probability).
    """
    student, teacher = student.float() / temperature, teacher.float() / temperature
    if top_k is not None and top_k < teacher.shape[-1]:
        student, teacher = coarsened(student, teacher, top_k)
    value: torch.Tensor = globals()[divergence](student, teacher, **settings)
    return value * temperature**2


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
        rest = logits.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
        return torch.cat([logits.gather(-1, best), rest], dim=-1).log_softmax(-1)

    return merged(student), merged(teacher)


def forward_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(p || q) (Hinton et al., 2015, section 2)."""
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(q || p), which lets the student leave out what it cannot cover (MiniLLM, Gu et al., 2024, section 2.1)."""
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


def jsd(student: torch.Tensor, teacher: torch.Tensor, beta: float = 0.5) -> torch.Tensor:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, Agarwal et al., 2024, section 2).

    Above 0 and below 1; over beta it tends to KL(p || q) for small beta, over 1 - beta to KL(q || p) for beta near 1.
    """
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


def skew_kl(student: torch.Tensor, teacher: torch.Tensor, skew: float = 0.1) -> torch.Tensor:
    """KL(p || skew p + (1 - skew) q) (DistiLLM, Ko et al., 2024, section 3.1)."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return _kl(log_p, _log_mixture(log_p, log_q, skew))


def skew_reverse_kl(student: torch.Tensor, teacher: torch.Tensor, skew: float = 0.1) -> torch.Tensor:
    """KL(q || (1 - skew) p + skew q) (DistiLLM, Ko et al., 2024, section 3.1)."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return _kl(log_q, _log_mixture(log_q, log_p, skew))


def tvd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Total variation distance, half the sum of |p - q| (f-distill, Wen et al., 2023, section 3)."""
    return (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2


def mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Squared difference of the logits summed over the classes; with the squared temperature it does not depend on it.

    The only one for regression heads (Ba and Caruana, 2014, section 2.2).
    """
    return (student - teacher).square().sum(-1)


def dkd(
    student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, alpha: float = 1.0, beta: float = 8.0
) -> torch.Tensor:
    """alpha KL(true class or not) + beta KL(among the other classes) (DKD, Zhao et al., 2022, sections 3.1 and 3.3).

    `labels`: (items,) class ids; -100 is no label and gives 0. With alpha = 1 and beta = 1 - p(true class) it would be
    KL(p || q); the paper's defaults for CIFAR-100 give the other classes more.
    """
    known = labels != IGNORED
    true = labels.where(known, 0).unsqueeze(-1)
    parts = [
        (logits.gather(-1, true).squeeze(-1), logits.scatter(-1, true, -torch.inf)) for logits in (teacher, student)
    ]
    # The log-odds of the true class are its logit less the log-sum-exp of the others: nothing cancels near 0 and 1.
    odds_p, odds_q = (own - others.logsumexp(-1) for own, others in parts)
    log_sigmoid = torch.nn.functional.logsigmoid
    of_true = _kl(*(torch.stack([log_sigmoid(odds), log_sigmoid(-odds)], -1) for odds in (odds_p, odds_q)))
    # Of the true class both log-probabilities are minus infinity here: 0 in their place, so that it adds nothing.
    among_others = _kl(*(others.log_softmax(-1).scatter(-1, true, 0.0) for _, others in parts))
    return (alpha * of_true + beta * among_others) * known


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(share a + (1 - share) b), by log-sum-exp: log(a + b) itself has too few digits near convergence."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))
