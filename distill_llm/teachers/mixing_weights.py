"""The weights of several teachers, learnt on held-out rows: those with which their mean predicts the labels best."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from distill_llm.common.errors import InputError
from distill_llm.losses.items import is_language_model, kind_of, targets
from distill_llm.teachers.ensemble import Ensemble

DIGITS = 4
"""Of a weight: what is beyond them changes the loss by less than held-out rows can tell."""
GAP = 1e-7
"""How far from the least loss the search may end, as a share of the loss at equal weights."""
MOST_STEPS = 20_000


@dataclass(frozen=True)
class HeldOut:
    """What held-out rows say.

    Attributes:
        weights: of the models, of DIGITS digits; their sum is 1.
        loss: with these weights, a mean over items: nats, or the squared error of a regression.
        alone: the loss of each model by itself.
        items: labelled examples or tokens.
    """

    weights: tuple[float, ...]
    loss: float
    alone: tuple[float, ...]
    items: int


def learn_weights(ensemble: Ensemble, batches: Callable[[], Iterable[Mapping[str, torch.Tensor]]]) -> HeldOut:
    """Find the weights with which the mean of the models has the least loss against the labels.

    The loss is convex in the weights, and the rows are read once by every model, one model after the other: of the mean of
    probabilities -log sum_m w_m p_m(y), of that of logits the cross-entropy of sum_m w_m z_m, of a regression the squared error
    of sum_m w_m v_m. Nothing is drawn, so the same rows give the same weights.

    Args:
        ensemble: has met its student, or agreed, and is placed; its own weights do not count.
        batches: gives the same batches each time, on the models' device, with labels.

    Raises:
        InputError: weights by confidence, a mean of a language model's logits, rows without a label, or models of which each
            gives a label a logit of minus infinity.
    """
    if ensemble.confidence:
        fix = "leave it out: weights by confidence are not those that are learnt"
        raise InputError("confidence", True, fix=fix)
    if ensemble.average == "logits" and is_language_model(ensemble.model):
        fix = "take probabilities: whole logits of all held-out tokens would have to be held"
        raise InputError("average", "logits", fix=fix)
    found = [list(zip(*_outputs(ensemble, number, batches()), strict=True)) for number in range(len(ensemble.members))]
    if not all(found):
        raise InputError("batches", "no rows", "held-out rows with labels")
    outputs = torch.stack([torch.cat(parts) for parts, _ in found], 1)  # (items, M, ...)
    labels = torch.cat(found[0][1])
    loss: Callable[[torch.Tensor], torch.Tensor]
    if ensemble.adds:
        weights, loss = likeliest_mixture(outputs), lambda w: -(outputs + w.log()).logsumexp(1).mean()
    elif ensemble.single:
        loss = _SquaredError(outputs, labels)
        weights = least(loss, outputs.shape[1])
    else:
        of_logits = _CrossEntropy(outputs, labels)
        loss, weights = of_logits, of_logits.least()
    weights = rounded(weights)
    alone = tuple(loss(each).item() for each in torch.eye(outputs.shape[1], dtype=torch.float64))
    return HeldOut(tuple(weights.tolist()), loss(weights).item(), alone, len(labels))


def _outputs(
    ensemble: Ensemble, number: int, batches: Iterable[Mapping[str, torch.Tensor]]
) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """By batch what the loss needs of one model, in fp64 on the CPU, and the labels of the items.

    Of the mean of probabilities (items,) log-probabilities of the labels, else (items, C) logits, or (items,) values.
    """
    kind = kind_of(ensemble.model)
    for batch in batches:
        positions, labels = (None, batch["labels"].flatten()) if kind == "example" else targets(batch, kind)
        assert labels is not None
        if not len(labels):
            continue
        logits = ensemble.outputs(number, batch, positions=positions).logits.double()
        if ensemble.adds:
            logits = logits.log_softmax(-1).gather(-1, labels[:, None].long()).squeeze(-1)
        elif ensemble.single:
            logits = logits.squeeze(-1)
        yield logits.cpu(), labels.cpu()


def likeliest_mixture(log_p: torch.Tensor) -> torch.Tensor:
    """(M,) the weights of a mixture that make what was seen likeliest, by expectation maximisation (Dempster et al., 1977).

    A weight is multiplied by the mean of p_m / sum_n w_n p_n until no model has a mean above 1 + GAP: by how much it is above
    bounds how far the mean log-likelihood is from its greatest value.

    Args:
        log_p: (items, M) fp64, the logarithm of what each model gave what was seen. Items that no model thinks possible
            say nothing about the weights, and are left out.
    """
    count, log_p = log_p.shape[1], log_p[log_p.amax(-1) > -torch.inf]
    ratios = (log_p - log_p.amax(-1, keepdim=True)).exp()
    weights = log_p.new_full((count,), 1 / count)
    for _ in range(MOST_STEPS if len(log_p) else 0):
        means = (ratios / (ratios @ weights)[:, None]).mean(0)
        if means.max() <= 1 + GAP:
            break
        weights = weights * means
    return weights / weights.sum()


class _CrossEntropy:
    """The loss of weighted sums of (items, M, C) logits against (items,) labels.

    A model of any weight rules out the classes that it gives minus infinity. Items whose label all models rule out say nothing
    about the weights, and are left out.
    """

    def __init__(self, outputs: torch.Tensor, labels: torch.Tensor):
        of_label = outputs.gather(2, labels.long()[:, None, None].expand(-1, outputs.shape[1], 1)).squeeze(-1)
        said = of_label.amax(1) > -torch.inf
        self.able = (of_label[said] > -torch.inf).all(0) & said.any()  # models that rule out no label
        out = outputs[said] == -torch.inf
        self.outputs, self.labels = outputs[said].masked_fill(out, 0.0), labels[said].long()
        self.ruled_out = out if out.any() else None

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        logits = torch.einsum("imc,m->ic", self.outputs, weights)
        if self.ruled_out is not None:
            logits = logits.masked_fill((self.ruled_out & (weights > 0)[:, None]).any(1), -torch.inf)
        return torch.nn.functional.cross_entropy(logits, self.labels)

    def least(self) -> torch.Tensor:
        """(M,) the weights of least loss: 0 for a model that rules out a label, with which the loss would be infinite."""
        if not self.able.any():
            fix = "take probabilities: each model gives a label of the held-out rows a logit of minus infinity"
            raise InputError("average", "logits", fix=fix)
        none = torch.zeros(len(self.able), dtype=torch.float64)
        found = least(lambda weights: self(none.masked_scatter(self.able, weights)), int(self.able.sum()))
        return none.masked_scatter(self.able, found)


class _SquaredError:
    """The loss of weighted sums of (items, M) values against (items,) values."""

    def __init__(self, outputs: torch.Tensor, labels: torch.Tensor):
        self.outputs, self.labels = outputs, labels.double()

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        return (self.outputs @ weights - self.labels).square().mean()


def least(loss: Callable[[torch.Tensor], torch.Tensor], count: int) -> torch.Tensor:
    """(M,) fp64 weights of 0 or more, with sum 1, at which a convex loss is least: accelerated projected gradients.

    FISTA (Beck and Teboulle, 2009), begun anew where the loss rises. The search ends where g.w - min_m g_m, with the gradient g,
    is at most GAP of the loss at equal weights: the loss is no further than that from its least value.
    """
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    ahead, momentum, step = weights, 1.0, 1.0
    value = first = loss(weights)
    for _ in range(MOST_STEPS):
        at, slope = _slope(loss, ahead)
        while True:
            new = projected(ahead - step * slope)
            moved = new - ahead
            if loss(new) <= at + slope @ moved + moved.square().sum() / (2 * step) + 1e-15 * abs(at):
                break
            step /= 2
        after = loss(new)
        if after > value:
            if momentum == 1.0:
                break  # within rounding
            ahead, momentum = weights, 1.0
            continue
        _, slope = _slope(loss, new)
        if slope @ new - slope.min() <= GAP * first:
            return new
        later = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = new + (momentum - 1) / later * (new - weights)
        weights, value, momentum = new, after, later
    return weights


def _slope(loss: Callable[[torch.Tensor], torch.Tensor], weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its gradient."""
    with torch.enable_grad():
        at = weights.detach().requires_grad_(True)
        value = loss(at)
        (slope,) = torch.autograd.grad(value, at)
    return value.detach(), slope


def projected(point: torch.Tensor) -> torch.Tensor:
    """The nearest point (M,) whose numbers are 0 or more and sum to 1."""
    falling = point.sort(descending=True).values
    levels = (falling.cumsum(0) - 1) / torch.arange(1, len(point) + 1, dtype=point.dtype)
    return (point - levels[falling > levels][-1]).clamp(min=0)


def rounded(weights: torch.Tensor) -> torch.Tensor:
    """Weights of DIGITS digits whose sum is 1: what rounding leaves over goes to the largest."""
    parts = (weights * 10**DIGITS).round()
    parts[parts.argmax()] += 10**DIGITS - parts.sum()
    return parts / 10**DIGITS
