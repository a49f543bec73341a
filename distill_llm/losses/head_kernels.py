"""Divergences of a few items with their gradients: any divergence by autograd, some by hand."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from distill_llm.common.errors import InputError, one_of
from distill_llm.losses.divergences import DIVERGENCES, log_mixture
from distill_llm.losses.logits import logits_divergence


class Block(NamedTuple):
    """A few items in fp32: logits over the temperature, and buffers for probabilities; kernels may overwrite all."""

    student: torch.Tensor
    teacher: torch.Tensor
    q: torch.Tensor
    p: torch.Tensor
    labels: torch.Tensor | None

    def probabilities(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """log q, log p, q and p of the student (q) and the teacher (p), in this block's four buffers."""
        for logits, out in ((self.student, self.q), (self.teacher, self.p)):
            logits.sub_(softmax_into(logits, out))
        return self.student, self.teacher, self.q, self.p


# A kernel returns the divergence of each item (R,) and its gradient with respect to block.student (R, C).
Kernel = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def kernel_of(divergence: str, settings: Mapping[str, Any], labelled: bool) -> Kernel:
    """The kernel of a divergence with these settings.

    Raises:
        InputError: no such divergence or setting, or one that needs labels where there are none.
    """
    if divergence not in DIVERGENCES:
        raise InputError("divergence", divergence, one_of(DIVERGENCES, divergence))
    _, known, needs_labels = DIVERGENCES[divergence]
    for name in settings:
        if name not in known:
            raise InputError(f"settings of {divergence}", name, one_of(known, name) if known else "none")
    if needs_labels and not labelled:
        raise InputError("labels", None, f"labels, because {divergence} needs the true classes")
    if divergence in BY_HAND and "top_k" not in settings:
        return partial(BY_HAND[divergence], **settings)
    return partial(_differentiated, divergence=divergence, settings=settings)


def by_autograd(function: Callable[..., torch.Tensor]) -> Kernel:
    """A kernel of any function of (R, C) logits of student and teacher to (R,) values: differentiated, over a block alone."""

    def kernel(block: Block, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            student = block.student.detach().requires_grad_()
            value = function(student, block.teacher, **settings)
            (gradient,) = torch.autograd.grad(value.sum(), student)
        return value.detach(), gradient

    return kernel


def _differentiated(block: Block, *, divergence: str, settings: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    labels: dict[str, Any] = {"labels": block.labels} if DIVERGENCES[divergence].needs_labels else {}
    return by_autograd(partial(logits_divergence, divergence=divergence))(block, **settings, **labels)


# By hand: two to four times as fast, in the block's own buffers. A divergence needs none to be used.
# What is multiplied by a probability of 0 is set to 0 before: it may be infinite, or no number (see `divergences`).


def _forward_kl(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    log_q, log_p, q, p = block.probabilities()
    value = torch.mul(p, _where(p, log_p.sub_(log_q)), out=log_p).sum(-1)
    return value, q.sub_(p)


def _reverse_kl(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    log_q, log_p, q, _ = block.probabilities()
    return _through_softmax(q, log_q.sub_(log_p), log_p)


def _jsd(block: Block, *, beta: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    log_q, log_p, q, p = block.probabilities()
    log_m = log_mixture(log_p, log_q, beta)
    of_teacher = p.mul_(_where(p, log_p.sub_(log_m))).sum(-1)
    of_student, gradient = _through_softmax(q, log_q.sub_(log_m), log_p)
    return beta * of_teacher + (1 - beta) * of_student, gradient.mul_(1 - beta)


def _skew_kl(block: Block, *, skew: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    log_q, log_p, q, p = block.probabilities()
    log_ratio = log_p.sub_(log_mixture(log_p, log_q, skew))
    value = p.mul_(log_ratio.masked_fill(p == 0, 0)).sum(-1)
    return value, _through_softmax(q, log_ratio.exp_(), log_q)[1].mul_(skew - 1)


def _skew_reverse_kl(block: Block, *, skew: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    log_q, log_p, q, p = block.probabilities()
    log_ratio = log_q.sub_(log_mixture(log_q, log_p, skew))
    value = torch.mul(q, _where(q, log_ratio), out=p).sum(-1)
    torch.exp(log_ratio, out=p)
    return value, _through_softmax(q, log_ratio.sub_(p, alpha=skew), log_p)[1]


BY_HAND: dict[str, Kernel] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
}


def softmax_into(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Probabilities into `out`; returns the logarithm of the sum of exponentials (R, 1)."""
    torch.softmax(logits, -1, out=out)
    return logits.amax(-1, keepdim=True).sub_(out.amax(-1, keepdim=True).log_())


def _where(probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values, 0 in place of those of probability 0."""
    return values.masked_fill_(probabilities == 0, 0)


def _through_softmax(q: torch.Tensor, slope: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of `slope` under q, and the gradient in logits of what has the gradient `slope` in q (made in `slope`)."""
    mean = torch.mul(q, _where(q, slope), out=scratch).sum(-1)
    return mean, slope.sub_(mean.unsqueeze(1)).mul_(q)
