"""Divergence of outputs, at a temperature of each item's own."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.losses.terms.outputs import ClassTerm
from distill_llm.losses.terms.term import Use, term

if TYPE_CHECKING:
    from torch import Tensor

HALVINGS = 40
LOWEST, HIGHEST = -10.0, 10.0
"""Natural logarithms of the temperatures among which one with the wanted entropy is looked for."""


@term("own_temperature")
class OwnTemperatureLoss(ClassTerm):
    """KL(teacher || student) of each item at a temperature that the item's logits decide.

    `spread`: each model's logits are divided by `temperature` times their own standard deviation over the classes, after their
    mean is taken away, and the loss is multiplied by the squared `temperature` (logit standardisation, Sun et al., 2024).
    Students learn the teacher's order and proportions, not its scale.
    `entropy`: both models' logits are divided by the temperature at which the teacher's distribution has the share `entropy` of
    the largest entropy, log C, and the loss is multiplied by its square (Hinton et al., 2015, section 2).
    """

    by: Literal["spread", "entropy"] = Field(default="spread", description="What decides the temperature of an item.")
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="Of spread: the common factor.")
    entropy: float = Field(default=0.5, gt=0, lt=1, description="Of entropy: the share of the largest entropy.")

    def faults(self, use: Use) -> Iterator[InputError]:
        """Two logits over their spread are 1 and -1, whatever they were."""
        yield from super().faults(use)
        if self.by == "spread" and use.classes == 2:
            yield InputError("by", self.by, "entropy: of two classes, the spread leaves nothing to learn from")

    def of_items(self, student: "Tensor", teacher: "Tensor") -> "Tensor":
        """The divergence of each item."""
        from distill_llm.losses.logits import logits_divergence

        if self.by == "spread":
            return logits_divergence(standardised(student), standardised(teacher), "forward_kl", self.temperature)
        temperature = temperature_of(teacher, self.entropy).unsqueeze(-1)
        return logits_divergence(student / temperature, teacher / temperature) * temperature.squeeze(-1) ** 2


def standardised(logits: "Tensor") -> "Tensor":
    """(items, C) logits less their mean, over their standard deviation; a class that is masked stays so and does not count."""
    from torch import inf

    there = logits != -inf
    count = there.sum(-1, keepdim=True).clamp(min=1)
    centred = logits.masked_fill(~there, 0)
    centred = (centred - centred.sum(-1, keepdim=True) / count).masked_fill(~there, 0)
    spread = (centred.square().sum(-1, keepdim=True) / count).clamp(min=1e-12).sqrt()
    return (centred / spread).masked_fill(~there, -inf)


def temperature_of(logits: "Tensor", share: float) -> "Tensor":
    """(items,) the temperature at which the distribution of each item has this share of the entropy log C, by halving.

    C is the number of classes that are not masked. Where all logits are equal no temperature changes the entropy: it ends at
    the lowest one.
    """
    from torch import inf

    there = (logits != -inf).sum(-1).clamp(min=2)
    wanted = share * there.float().log()
    low, high = logits.new_full(wanted.shape, LOWEST), logits.new_full(wanted.shape, HIGHEST)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        log_p = (logits / middle.exp().unsqueeze(-1)).log_softmax(-1)
        entropy = -(log_p.exp() * log_p.masked_fill(log_p == -inf, 0)).sum(-1)
        low, high = middle.where(entropy < wanted, low), high.where(entropy < wanted, middle)
    return ((low + high) / 2).exp()
