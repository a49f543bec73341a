"""Divergences of a few items, each with its gradient in closed form, in buffers that are overwritten."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from distill_llm.errors import InputError, one_of
from distill_llm.losses.objective import DIVERGENCES, NEED_LABELS


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


def _forward_kl(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || q) (Hinton et al., 2015)."""
    log_q, log_p, q, p = block.probabilities()
    value = torch.mul(p, log_p.sub_(log_q), out=log_p).sum(-1)
    return value, q.sub_(p)


def _reverse_kl(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || p) (Gu et al., 2024, MiniLLM)."""
    log_q, log_p, q, _ = block.probabilities()
    return _through_softmax(q, log_q.sub_(log_p), log_p)


def _jsd(block: Block, *, beta: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (Agarwal et al., 2024, GKD)."""
    log_q, log_p, q, p = block.probabilities()
    log_m = _log_mixture(log_p, log_q, beta)
    of_teacher = p.mul_(log_p.sub_(log_m)).sum(-1)
    of_student, gradient = _through_softmax(q, log_q.sub_(log_m), log_p)
    return beta * of_teacher + (1 - beta) * of_student, gradient.mul_(1 - beta)


def _skew_kl(block: Block, *, skew: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(p || m) with m = skew p + (1 - skew) q (Ko et al., 2024, DistiLLM)."""
    log_q, log_p, q, p = block.probabilities()
    log_ratio = log_p.sub_(_log_mixture(log_p, log_q, skew))
    value = torch.mul(p, log_ratio, out=p).sum(-1)
    return value, _through_softmax(q, log_ratio.exp_(), log_q)[1].mul_(skew - 1)


def _skew_reverse_kl(block: Block, *, skew: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(q || m) with m = (1 - skew) p + skew q (Ko et al., 2024, DistiLLM)."""
    log_q, log_p, q, p = block.probabilities()
    log_ratio = log_q.sub_(_log_mixture(log_q, log_p, skew))
    value = torch.mul(q, log_ratio, out=p).sum(-1)
    torch.exp(log_ratio, out=p)
    return value, _through_softmax(q, log_ratio.sub_(p, alpha=skew), log_p)[1]


def _tvd(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Total variation distance, sum |p - q| / 2 (Wen et al., 2023)."""
    difference, scratch, q, p = block.probabilities()
    torch.sub(q, p, out=difference)
    value = torch.abs(difference, out=scratch).sum(-1) / 2
    return value, _through_softmax(q, difference.sign_().div_(2), scratch)[1]


def _mse(block: Block) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared difference of the logits summed over classes; times temperature^2, it does not depend on it."""
    difference = block.student.sub_(block.teacher)
    return torch.square(difference, out=block.teacher).sum(-1), difference.mul_(2)


def _dkd(block: Block, *, alpha: float = 1.0, beta: float = 8.0) -> tuple[torch.Tensor, torch.Tensor]:
    """alpha KL(target or not) + beta KL(among the others) (Zhao et al., 2022, DKD); 0 for items without a label."""
    assert block.labels is not None
    counted = ((block.labels >= 0) & (block.labels < block.student.shape[1])).unsqueeze(1)
    target = block.labels.unsqueeze(1).where(counted, 0)
    binary = []
    for logits in (block.student, block.teacher):
        at_target = logits.gather(1, target)
        logits.scatter_(1, target, -torch.inf)
        binary.append(at_target - logits.logsumexp(1, keepdim=True))  # log-odds of the target
    sigmoid, log_sigmoid = torch.sigmoid, nn.functional.logsigmoid
    odds_q, odds_p = binary
    of_target = sigmoid(odds_p) * (log_sigmoid(odds_p) - log_sigmoid(odds_q)) + sigmoid(-odds_p) * (
        log_sigmoid(-odds_p) - log_sigmoid(-odds_q)
    )
    log_q, log_p, q, p = block.probabilities()
    ratio = log_p.sub_(log_q).scatter_(1, target, 0.0)
    value = alpha * of_target + beta * torch.mul(p, ratio, out=ratio).sum(-1, keepdim=True)
    slope = alpha * (sigmoid(odds_q) - sigmoid(odds_p))
    gradient = p.mul_(-beta).add_(q.mul_(beta - slope)).scatter_(1, target, slope)
    return (value * counted).squeeze(1), gradient.mul_(counted)


KERNELS: dict[str, Kernel] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_kl": _skew_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "mse": _mse,
    "dkd": _dkd,
}


def softmax_into(logits: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Probabilities into `out`; returns the logarithm of the sum of exponentials (R, 1)."""
    torch.softmax(logits, -1, out=out)
    return logits.amax(-1, keepdim=True).sub_(out.amax(-1, keepdim=True).log_())


def _log_mixture(log_a: torch.Tensor, log_b: torch.Tensor, share: float) -> torch.Tensor:
    """log(share a + (1 - share) b)."""
    return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))


def _through_softmax(q: torch.Tensor, slope: torch.Tensor, scratch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of `slope` under q, and the gradient in logits of what has the gradient `slope` in q (made in `slope`)."""
    mean = torch.mul(q, slope, out=scratch).sum(-1)
    return mean, slope.sub_(mean.unsqueeze(1)).mul_(q)


def _coarsened(block: Block, *, kernel: Kernel, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A divergence of k + 1 outcomes, as `distill_llm.losses.logits.coarsened` makes them."""
    if top_k >= block.teacher.shape[1]:
        return kernel(block)
    best = block.teacher.topk(top_k, dim=1).indices
    merged = []
    for logits, among_others in ((block.student, block.q), (block.teacher, block.p)):
        own = logits.gather(1, best)
        rest = softmax_into(logits.scatter_(1, best, -torch.inf), among_others)
        merged.append(torch.cat([own, rest], 1))
    student, teacher = merged
    value, slope = kernel(Block(student, teacher, torch.empty_like(student), torch.empty_like(teacher), None))
    return value, block.q.mul_(slope[:, top_k:]).scatter_(1, best, slope[:, :top_k])


def kernel_of(divergence: str, settings: Mapping[str, Any], labelled: bool) -> Kernel:
    """The kernel of that name with these settings."""
    if divergence not in DIVERGENCES:
        raise InputError("divergence", divergence, one_of(DIVERGENCES, divergence))
    known = DIVERGENCES[divergence]
    for name in settings:
        if name not in known:
            raise InputError(f"settings of {divergence}", name, one_of(known, name) if known else "none")
    if divergence in NEED_LABELS and not labelled:
        raise InputError("labels", None, f"labels with {divergence}, which treats the true class apart")
    own = {name: value for name, value in settings.items() if name != "top_k"}
    kernel = partial(KERNELS[divergence], **own)
    return partial(_coarsened, kernel=kernel, top_k=settings["top_k"]) if "top_k" in settings else kernel
