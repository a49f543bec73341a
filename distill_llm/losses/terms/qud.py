"""The teacher's embedding of an example told from those of others."""

from typing import TYPE_CHECKING

from distill_llm.losses.terms.queued import QueuedTerm
from distill_llm.losses.terms.term import term

if TYPE_CHECKING:
    from torch import Tensor


@term("qud")
class QudLoss(QueuedTerm):
    """Cross-entropy of finding the teacher's embedding of the same example among a queue of others (QUD, Kolf et al., 2024).

    The form is that of InfoNCE (van den Oord et al., 2018). Without anything in the queue, as in the first step, it is 0.
    """

    def of_examples(self, own: "Tensor", others: "Tensor", counts: "Tensor", level: "Tensor") -> "Tensor":
        """-log of the softmax at the example's own."""
        import torch

        negatives = others.masked_fill(~counts.unsqueeze(1), -torch.inf)
        return torch.cat([own.unsqueeze(-1), negatives], -1).logsumexp(-1) - own
