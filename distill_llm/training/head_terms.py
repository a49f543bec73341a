"""Terms about the outputs of a language model, made inside its forward with no logits held whole."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distill_llm.losses.chunked_head import HeadLosses, head_losses
from distill_llm.losses.head_parts import Part
from distill_llm.losses.signals import Batch
from distill_llm.models.adapters import without_adapters
from distill_llm.models.item_logits import packed
from distill_llm.models.output_head import OutputHead
from distill_llm.training.terms import Terms


class HeadTerms:
    """Computes terms about outputs where the student's output map is called, a chunk of items at a time.

    The loss leaves the forward as `outputs.loss`: whatever wraps the model (DDP, FSDP) sees it as an output of the
    parameters it is made from, and the output map's weight, tied or not, gets its gradient as in any other model.

    Args:
        terms: of the same student and teacher; none of them needs whole logits.
        student: as it is trained, adapters and all.
        head: the student's output map.
    """

    def __init__(self, terms: Terms, student: nn.Module, head: OutputHead):
        self.terms, self.student, self.head = terms, student, head

    @contextmanager
    def inside(
        self, batch: Batch, positions: torch.Tensor, factors: Mapping[str, torch.Tensor]
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Compute the terms in the one forward of the student inside the context.

        Args:
            batch: before the forward; the teacher's signals are HeadSignals or SparseSignals.
            positions: (items,) of the flattened tokens that count.
            factors: by term, 0-dim: what its sum is multiplied by in `outputs.loss`; only terms about outputs are computed.

        Yields:
            The sums, unweighted and without gradient, once the forward has run.
        """
        found: dict[str, torch.Tensor] = {}
        losses: list[HeadLosses] = []
        parts = self._parts(batch, factors)

        def receive(hidden: torch.Tensor) -> None:
            losses.append(head_losses(self.head.head, hidden, list(parts.values())))

        def attach(module: nn.Module, args: Any, outputs: Any) -> None:
            made = losses.pop()
            outputs["loss"] = made.total
            found.update(zip(parts, made.sums, strict=True))

        # First of all hooks on the outputs: those of sharding look for the tensors that have gradients.
        handle = self.student.register_forward_hook(attach, prepend=True)
        try:
            with packed(without_adapters(self.student), positions), self.head.handing_on(receive):
                yield found
        finally:
            handle.remove()

    def _parts(self, batch: Batch, factors: Mapping[str, torch.Tensor]) -> dict[str, Part]:
        terms = {name: term for name, term in self.terms.terms.items() if "logits" in term.signals}
        return {name: term.in_head(batch, self.terms.match, factors[name]) for name, term in terms.items()}
