"""Divergences between the teacher's and the student's output distributions."""

import math

import torch


def logits_divergence(
    student: torch.Tensor, teacher: torch.Tensor, divergence: str = "forward_kl", temperature: float = 1.0
) -> torch.Tensor:
    """Divergence of each item times the squared temperature, which keeps the size of gradients (Hinton et al., 2015).

    With p the teacher's and q the student's probabilities at the temperature: `forward_kl` is KL(p || q), `reverse_kl`
    is KL(q || p), `jsd` the mean of KL(p || m) and KL(q || m) with m = (p + q) / 2. `mse` is the squared difference of
    the logits summed over the classes (the temperature and its square cancel); the only one for regression heads.

    Args:
        student: (items, classes) logits.
        teacher: (items, classes) logits, no gradient.
        divergence: forward_kl, reverse_kl, jsd or mse.
        temperature: above 0.

    Returns:
        (items,) in fp32, in nats (mse: squared logits).
    """
    if divergence == "mse":
        return (student.float() - teacher.float()).square().sum(-1)
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    log_p = torch.log_softmax(teacher.float() / temperature, dim=-1)
    if divergence == "forward_kl":
        value = _kl(log_p, log_q)
    elif divergence == "reverse_kl":
        value = _kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        value = (_kl(log_p, log_m) + _kl(log_q, log_m)) / 2
    return value * temperature**2


def _kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)
