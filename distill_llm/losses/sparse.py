"""Losses between a teacher known at a few tokens per item and a student known at all: what a cache on disk holds.

A `SparseTargets` comes either from the top k (the mass of every other token is explicit, as `rest`) or from random
sampling (Anshumann et al., 2025: counts of tokens drawn from the teacher, `rest` is 0). Cross-entropy is linear in the
targets, so with sampled ones it and its gradient are right in expectation, which those of a cut-off top k cannot be.
Entropy is not linear: a sample has less than the teacher, so what is subtracted for a KL is part of the targets.
"""

from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


class SparseTargets(NamedTuple):
    """The teacher's distribution of each item: a few tokens, and all others as one.

    An entry of probability 0 is padding. The entries of an item are distinct; they and the rest sum to 1.

    ids: (items, k) int64. probabilities: (items, k) fp32. rest: (items,) fp32, the probability of all other tokens.
    teacher_nll: (items,) fp32, in nats, the cross-entropy of these with the teacher itself: for a top k `entropy_of` its
    parts; for a sample an estimate of the teacher's entropy, whose noise a student near the teacher shares.
    """

    ids: torch.Tensor
    probabilities: torch.Tensor
    rest: torch.Tensor
    teacher_nll: torch.Tensor

    def to(self, device: torch.device) -> "SparseTargets":
        """The same on a device, without waiting for it."""
        return SparseTargets(*(each.to(device, non_blocking=True) for each in self))

    def rows(self, chosen: Any) -> "SparseTargets":
        """The same for a choice of items: a slice, indices or a mask."""
        return SparseTargets(*(each[chosen] for each in self))


def sparse_cross_entropy(student: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    """-sum_i p_i log q_i - p_rest log q_rest of each item, with q_rest the student's mass outside the item's tokens.

    Args:
        student: (items, V) logits.
        targets: no gradient.

    Returns:
        (items,) in fp32 (fp64 for fp64 logits), in nats. The gradient is made in closed form along with the value.
    """
    value: torch.Tensor = _SparseCrossEntropy.apply(student, targets)
    return value


def sparse_forward_kl(student: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
    """KL(teacher || student) of each item, over its tokens and the rest as one outcome; arguments as above.

    With a top k at most the KL over the whole vocabulary, and equal to it where the targets hold all of it. With sampled
    targets value and gradient are unbiased estimates of those over the whole vocabulary, without noise where the student
    is the teacher; the value of a single item may be below 0.
    """
    return sparse_cross_entropy(student, targets) - targets.teacher_nll


def entropy_of(probabilities: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """(items,) entropy in nats of (items, k) probabilities and (items,) the rest as one outcome."""
    return torch.special.entr(probabilities).sum(-1) + torch.special.entr(rest)


def value_and_grad(
    student: torch.Tensor, targets: SparseTargets, with_grad: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`sparse_cross_entropy` of a chunk of items and its gradient by the logits, without autograd.

    The gradient of the sum is q - p at the item's tokens and (q_rest - p_rest) q_j / q_rest at every other token j (the
    targets summing to 1). The one buffer of the size of the logits is the gradient. Everything is taken from the
    log-sum-exp of the tokens outside, so nothing cancels where q_rest is near 0 or 1.

    Args:
        student: (items, V) logits, any float dtype.
        targets: of these items.

    Returns:
        (items,) values and (items, V) gradient, in fp32 (fp64 for fp64 logits); None in place of a gradient not wanted.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    lowest = torch.finfo(dtype).min
    p, p_rest = targets.probabilities.to(dtype), targets.rest.to(dtype)
    held = p > 0
    # Padding points at a token that is held anyway, so it cannot take another one out of the rest.
    ids = torch.where(held, targets.ids, targets.ids.gather(1, p.argmax(-1, keepdim=True)))
    z = student.gather(1, ids).to(dtype).masked_fill(~held, 0)
    others = student.to(dtype, copy=True).scatter_(1, ids, -torch.inf)
    log_held = z.masked_fill(~held, -torch.inf).logsumexp(-1)
    log_others = others.logsumexp(-1)
    p_rest = p_rest.masked_fill(held.sum(-1) == student.shape[1], 0)  # nothing is outside: a rounding error
    mass = p.sum(-1) + p_rest
    outside = torch.where(p_rest > 0, p_rest * log_others, 0)  # infinite where the student has nothing outside
    log_others = log_others.clamp(min=lowest)
    log_all = torch.logaddexp(log_held, log_others)
    value = mass * log_all - (p * z).sum(-1) - outside
    if not with_grad:
        return value, None
    scale = mass * (log_others - log_all).exp() - p_rest
    gradient = others.sub_(log_others[:, None]).exp_().mul_(scale[:, None])
    inside = mass[:, None] * (z - log_all[:, None]).exp() - p
    return value, gradient.scatter_add_(1, ids, torch.where(held, inside, 0))


class _SparseCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, targets: SparseTargets) -> torch.Tensor:
        value, gradient = value_and_grad(student, targets, ctx.needs_input_grad[0])
        if gradient is not None:
            # Near convergence the slopes are too small for fp16.
            ctx.save_for_backward(gradient if student.dtype == torch.float16 else gradient.to(student.dtype))
            ctx.dtype = student.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(ctx.dtype), None
