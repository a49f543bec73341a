"""Pairs of embeddings of one example told from pairs of two."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from distill_llm.common.errors import InputError
from distill_llm.losses.terms.queued import QueuedTerm
from distill_llm.losses.terms.term import Use, term

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.memory import Queues
    from distill_llm.losses.signals import Batch


@term("contrast")
class ContrastLoss(QueuedTerm):
    """Whether an embedding of the student and one of the teacher are of the same example (CRD, Tian et al., 2020).

    With N negatives, a pair is taken for one of the same example with the probability h = x / (x + N Z), where x is exp(cosine /
    temperature) and Z the mean of x over pairs of different examples, which is a constant: that of the first step that has such
    pairs (as Wu et al., 2018, set theirs). The value of an example is -log h of its own pair less the sum of log(1 - h) over its
    negatives; it is 0 as long as there is no Z. The teacher's embeddings are not projected, and negatives come from a queue in
    place of a memory of all rows.
    """

    negatives: Literal["all", "other_classes"] = Field(
        default="all", description="Whether examples of the same class, by the labels of the data, are negatives too."
    )

    @property
    def asks_for_labels(self) -> str | None:
        """The negatives, where they are chosen by class."""
        return None if self.negatives == "all" else "negatives"

    def faults(self, use: Use) -> Iterator[InputError]:
        """Classes must be classes of examples."""
        yield from super().faults(use)
        if self.negatives == "other_classes" and (given := not_a_class(use)):
            yield InputError("negatives", f"other_classes with {given}", "all: there are no classes of examples here")

    def negatives_of(self, batch: "Batch", memory: "Queues", keys: "Tensor") -> "Tensor":
        """Those of other texts, and if asked of other classes."""
        found = memory.others(keys)
        if self.negatives == "all":
            return found
        labels = self.labels_of(batch, keys)[:, None]
        return found & ((memory.labels != labels) | (labels < 0))

    def labels_of(self, batch: "Batch", keys: "Tensor") -> "Tensor":
        """The labels, where they matter."""
        if self.negatives == "all":
            return super().labels_of(batch, keys)
        return batch.needed_labels("losses.contrast.negatives")

    def of_examples(self, own: "Tensor", others: "Tensor", counts: "Tensor", level: "Tensor") -> "Tensor":
        """See above, in logarithms: h is the sigmoid of log x - log(N Z)."""
        from torch.nn.functional import softplus

        number = counts.sum(-1, keepdim=True)
        beside = number.clamp(min=1).log() + level.nan_to_num(0.0)
        missed = softplus(beside - own) * (number > 0)
        found = missed + (softplus(others - beside.unsqueeze(-1)) * counts.unsqueeze(1)).sum(-1)
        return found * level.isfinite()


def not_a_class(use: Use) -> str | None:
    """What labels are about, where not about classes of examples; None: they may be."""
    if use.kind not in (None, "example"):
        return "an output for each token"
    if use.mixed:
        return f"mixtures of examples ({use.mixed})"
    return "a single output (a regression)" if use.single_output else None
