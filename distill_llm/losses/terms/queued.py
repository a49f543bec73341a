"""A term that sets the student's embedding of an example against embeddings that the teacher gave of others, in a queue."""

from abc import abstractmethod
from typing import TYPE_CHECKING, cast

from pydantic import Field

from distill_llm.losses.terms.embedded import EmbeddedTerm

if TYPE_CHECKING:
    from torch import Tensor

    from distill_llm.losses.mapping import LayerPair
    from distill_llm.losses.matching import Match
    from distill_llm.losses.memory import Queues
    from distill_llm.losses.signals import Batch


class QueuedTerm(EmbeddedTerm):
    """Base of terms with a queue of the teacher's embeddings of the steps before this one.

    An embedding of the same text is no negative, however often the text comes. In a step all examples see the same queue.
    """

    temperature: float = Field(default=0.1, gt=0, allow_inf_nan=False, description="Divides the cosines of embeddings.")
    queue: int = Field(default=4096, ge=1, description="How many of the teacher's latest embeddings are negatives.")

    def memory(self, match: "Match", pairs: "list[LayerPair]") -> "Queues":
        """A queue of each layer pair."""
        from distill_llm.losses.memory import Queues

        return Queues(self.queue, len(pairs), match.width, self.temperature)

    @abstractmethod
    def of_examples(self, own: "Tensor", others: "Tensor", counts: "Tensor", level: "Tensor") -> "Tensor":
        """The value of each example and layer pair, (B, L).

        Args:
            own: (B, L) similarities over the temperature, of the student's embedding and the teacher's of the same example.
            others: (B, L, K) those of the student's embedding and the queue's.
            counts: (B, K) of bool: which of the queue are negatives of an example.
            level: (L,) see `Queues`.
        """

    def negatives_of(self, batch: "Batch", memory: "Queues", keys: "Tensor") -> "Tensor":
        """(B, K) of bool: which embeddings of the queue count as negatives of each example."""
        return memory.others(keys)

    def labels_of(self, batch: "Batch", keys: "Tensor") -> "Tensor":
        """(B,) what the queue keeps as the labels of the examples; below 0: nothing."""
        return keys.new_full(keys.shape, -1)

    def sum(self, batch: "Batch", match: "Match", pairs: "list[LayerPair]") -> "Tensor":
        """The sum over examples of the mean over layer pairs."""
        import torch

        from distill_llm.losses.memory import text_keys

        memory = cast("Queues", match.memories[self.name])
        own, source = self.embeddings(batch, match, pairs)
        keys = text_keys(batch.tokens, batch.valid)
        counts = self.negatives_of(batch, memory, keys)
        memory.keep(own, source, keys, self.labels_of(batch, keys))
        similar = torch.einsum("blh,lkh->blk", own, memory.vectors) / self.temperature
        values = self.of_examples((own * source).sum(-1) / self.temperature, similar, counts, memory.level)
        return values.mean(1).sum()
