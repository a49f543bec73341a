"""Divergences between the teacher's and the student's output distributions, each a function of their logits.

A divergence takes the student's and the teacher's logits, (items, classes) in fp32 and over the temperature already, and
its own settings by name; it returns (items,) values, in nats where nothing else is said. p is the teacher's distribution,
q the student's. `@divergence()` makes it one that objectives can name: nothing else has to know of it.

A logit of minus infinity is a class of probability 0 (a model may mask classes): 0 log 0 is 0, in values and in gradients. Where
only one of the two models has the class, KL is infinite if the other one says it is possible.

torch is not imported here, since objectives are checked without it: tensors bring all that is needed.
"""

import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from distill_llm.losses.registry import refuse_taken

if TYPE_CHECKING:
    from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., "Tensor"])


class Divergence(NamedTuple):
    """A function of this kind, the settings that an objective may give to it, and whether it is given `labels` too."""

    function: Callable[..., "Tensor"]
    settings: tuple[str, ...]
    needs_labels: bool


DIVERGENCES: dict[str, Divergence] = {}

SETTINGS = ("beta", "skew", "alpha", "delta")
"""What the parameters of a divergence may be called: the settings that `LogitsLoss` (`losses/terms/logits.py`) has fields for."""

OF_VALUES = ("mse", "huber")
"""Those that compare logits as they are, and so values of a regression too."""


def divergence(top_k: bool = True) -> Callable[[Function], Function]:
    """A decorator: the function's name becomes that of a divergence, its keywords become settings.

    A parameter `labels` is no setting: it gets the (items,) class ids, -100 where there is none.

    Args:
        top_k: whether classes may be merged before (see `distill_llm.losses.logits.coarsened`): it then gets
            log-probabilities, and `top_k` is a setting too. Never with `labels`.

    Raises:
        ValueError: a name that is taken, or a parameter that no objective can set or that has no default.
    """

    def register(function: Function) -> Function:
        known = DIVERGENCES.get(function.__name__)
        what = f"divergence {function.__name__!r}"
        refuse_taken(known and known.function, function, what)
        parameters = dict([*inspect.signature(function).parameters.items()][2:])
        own = [*parameters]
        for name in own:
            if name not in ("labels", *SETTINGS):
                raise ValueError(f"{what}: no objective can set {name!r}; name it {', '.join(SETTINGS)} or labels")
            if name != "labels" and parameters[name].default is inspect.Parameter.empty:
                raise ValueError(f"{what}: give {name!r} a default, for objectives that leave it out")
        labels = "labels" in own
        settings = (*(name for name in own if name != "labels"), *(("top_k",) if top_k and not labels else ()))
        DIVERGENCES[function.__name__] = Divergence(function, settings, labels)
        return function

    return register


@divergence()
def forward_kl(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """KL(p || q) (Hinton et al., 2015, section 2)."""
    return _kl(teacher.log_softmax(-1), student.log_softmax(-1))


@divergence()
def reverse_kl(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """KL(q || p), which lets the student leave out what it cannot cover (MiniLLM, Gu et al., 2024, section 2.1)."""
    return _kl(student.log_softmax(-1), teacher.log_softmax(-1))


@divergence()
def jsd(student: "Tensor", teacher: "Tensor", beta: float = 0.5) -> "Tensor":
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, Agarwal et al., 2024, section 2).

    Above 0 and below 1; over beta it tends to KL(p || q) for small beta, over 1 - beta to KL(q || p) for beta near 1.
    """
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    log_m = log_mixture(log_p, log_q, beta)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


@divergence()
def skew_kl(student: "Tensor", teacher: "Tensor", skew: float = 0.1) -> "Tensor":
    """KL(p || skew p + (1 - skew) q) (DistiLLM, Ko et al., 2024, section 3.1)."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return _kl(log_p, log_mixture(log_p, log_q, skew))


@divergence()
def skew_reverse_kl(student: "Tensor", teacher: "Tensor", skew: float = 0.1) -> "Tensor":
    """KL(q || (1 - skew) p + skew q) (DistiLLM, Ko et al., 2024, section 3.1)."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    return _kl(log_q, log_mixture(log_q, log_p, skew))


@divergence()
def tvd(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Total variation distance, half the sum of |p - q|, a probability (f-distill, Wen et al., 2023, section 3)."""
    return (teacher.softmax(-1) - student.softmax(-1)).abs().sum(-1) / 2


@divergence(top_k=False)
def mse(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Squared difference of the logits summed over the classes; with the squared temperature it does not depend on it.

    It and `huber` are for regression heads too (Ba and Caruana, 2014, section 2.2). A class that both mask adds nothing.
    """
    return (student - teacher).masked_fill(student == teacher, 0).square().sum(-1)  # infinities have no difference


@divergence(top_k=False)
def probability_mse(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """Sum of (p - q)^2: the squared error of probabilities, where `mse` has that of logits.

    With the squared temperature, as the temperature grows, it and its gradient tend to those of the squared difference of the
    logits, each less its mean over the C classes, divided by C^2 (so does cross-entropy: Hinton et al., 2015, section 2.1).
    """
    return (teacher.softmax(-1) - student.softmax(-1)).square().sum(-1)


@divergence(top_k=False)
def huber(student: "Tensor", teacher: "Tensor", delta: float = 1.0) -> "Tensor":
    """Differences of logits, half the square up to `delta`, linear beyond, summed over the classes (Huber, 1964).

    With a temperature, `delta` is of logits divided by it. A class that both mask adds nothing.
    """
    difference = (student - teacher).masked_fill(student == teacher, 0).abs()
    within = difference.clamp(max=delta)
    return (within * (difference - within / 2)).sum(-1)


@divergence()
def dkd(student: "Tensor", teacher: "Tensor", labels: "Tensor", alpha: float = 1.0, beta: float = 8.0) -> "Tensor":
    """alpha KL(true class or not) + beta KL(among the other classes) (DKD, Zhao et al., 2022, sections 3.1 and 3.3).

    0 for an item without a label, or with one beyond the classes. With alpha = 1 and beta = 1 - p(true class) it would be
    KL(p || q); the paper's defaults for CIFAR-100 give the other classes more.
    """
    known = (labels >= 0) & (labels < student.shape[-1])
    true = labels.where(known, 0).unsqueeze(-1)
    parts = [(logits.gather(-1, true), logits.scatter(-1, true, -math.inf)) for logits in (teacher, student)]
    # The log-odds of the true class are its logit less the log-sum-exp of the others: nothing cancels near 0 and 1.
    odds_p, odds_q = (own - log_total(others) for own, others in parts)
    of_true = sum(_kl(_log_sigmoid(sign * odds_p), _log_sigmoid(sign * odds_q)) for sign in (1, -1))
    # Where one of them has no class but the true one there is nothing to compare: of_true has said it all.
    alone = sum(others.amax(-1, keepdim=True) == -math.inf for _, others in parts).bool()
    among_others = _kl(*(others.masked_fill(alone, 0.0).log_softmax(-1) for _, others in parts))
    return (alpha * of_true + beta * among_others) * known


def log_total(logits: "Tensor") -> "Tensor":
    """Log-sum-exp over the last dimension, which stays; of nothing but minus infinity that, and its slope is 0."""
    nothing = logits.amax(-1, keepdim=True) == -math.inf
    return logits.masked_fill(nothing, 0).logsumexp(-1, keepdim=True).masked_fill(nothing, -math.inf)


def log_mixture(log_a: "Tensor", log_b: "Tensor", share: float) -> "Tensor":
    """log(share a + (1 - share) b), by log-sum-exp: log(a + b) itself has too few digits near convergence.

    The lowest number stands for the logarithm of 0: the slope of minus infinity would be no number.
    """
    return (log_a + math.log(share)).clamp(min=_lowest(log_a)).logaddexp(log_b + math.log1p(-share))


def _lowest(of: "Tensor") -> float:
    from torch import finfo

    return finfo(of.dtype).min


def _kl(log_p: "Tensor", log_q: "Tensor") -> "Tensor":
    p = log_p.exp()
    return (p * (log_p - log_q).masked_fill(p == 0, 0)).sum(-1)


def _log_sigmoid(x: "Tensor") -> "Tensor":
    return -(-x).logaddexp(x.new_zeros(()))
