"""Inputs found by optimising them: a class is made likely, and layers see what they expect to see."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill_llm.architectures.modes import frozen
from distill_llm.models.inputs import forward_inputs
from distill_llm.synthesis.norms import NormStatistics
from distill_llm.synthesis.spaces import Space


@dataclass(frozen=True)
class Ascent:
    """How inputs are optimised.

    Without `statistics` the logit of an input's class is made large (activation maximisation: Simonyan et al., 2013). With them
    the cross-entropy against that class is made small, and with it the distance of the layers' statistics from what their
    norms expect (DeepInversion, Yin et al., 2020).

    Attributes:
        steps: of Adam.
        learning_rate: of Adam, on standardised values.
        prior: weight of the mean square of standardised values, which keeps inputs in the space.
        statistics: weight of the mean distance over norms (see `NormStatistics`); None: norms are not looked at.
    """

    steps: int = 100
    learning_rate: float = 0.05
    prior: float = 0.01
    statistics: float | None = None


def climb(model: PreTrainedModel, space: Space, classes: Tensor, settings: Ascent, draws: torch.Generator) -> Tensor:
    """Inputs (B, *space.shape) that a model gives these classes (B,); they begin as noise.

    The inputs of one call belong together where statistics are matched; without them each is found alone. The model's weights
    get no gradient, and its mode comes back afterwards.
    """
    values = space.noise(len(classes), draws).requires_grad_(True)
    optimizer = torch.optim.Adam([values], lr=settings.learning_rate)
    classes = classes.to(values.device)
    norms = NormStatistics(model) if settings.statistics is not None else None
    with frozen(model), torch.enable_grad():
        for _ in range(settings.steps):
            loss = _loss(model, space, values, classes, settings, norms)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        return space.whole(values).detach()


def _loss(
    model: PreTrainedModel,
    space: Space,
    values: Tensor,
    classes: Tensor,
    settings: Ascent,
    norms: NormStatistics | None,
) -> Tensor:
    """Summed over inputs, so that an input's path does not depend on how many there are."""
    with ExitStack() as forward:
        distances = forward.enter_context(norms.watching()) if norms is not None else []
        logits = model(**forward_inputs(model, space.batch(space.whole(values)))).logits.float()
    if norms is None:
        of_class = -logits.gather(-1, classes.unsqueeze(-1)).sum()
    else:
        of_class = torch.nn.functional.cross_entropy(logits, classes, reduction="sum")
    loss = of_class + settings.prior * values.square().flatten(1).mean(-1).sum()
    if distances:
        assert settings.statistics is not None
        loss = loss + settings.statistics * len(values) * torch.stack(distances).mean()
    return loss
