"""The terms `labels` and `logits` of a language model, made inside its forward with no logits held whole."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from distill_llm.losses.chunked_head import HeadLosses, head_losses
from distill_llm.losses.schedules import value_at
from distill_llm.models.adapters import without_adapters
from distill_llm.models.item_logits import packed
from distill_llm.models.output_head import OutputHead
from distill_llm.models.recording import SparseSignals
from distill_llm.teachers.online import HeadSignals
from distill_llm.training.terms import Batch, Terms


class HeadTerms:
    """Computes `labels` and `logits` where the student's output map is called, a chunk of items at a time.

    The loss leaves the forward as `outputs.loss`: whatever wraps the model (DDP, FSDP) sees it as an output of the
    parameters it is made from, and the output map's weight, tied or not, gets its gradient as in any other model.

    Args:
        terms: of the same student and teacher.
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
            factors: by term, 0-dim: what its sum is multiplied by in `outputs.loss`; other terms' are not looked at.

        Yields:
            The sums, unweighted and without gradient, once the forward has run.
        """
        found: dict[str, torch.Tensor] = {}
        losses: list[HeadLosses] = []

        def receive(hidden: torch.Tensor) -> None:
            losses.append(self._losses(hidden, batch, factors))

        def attach(module: nn.Module, args: Any, outputs: Any) -> None:
            made = losses.pop()
            outputs["loss"] = made.total
            found.update({name: getattr(made, name) for name in ("labels", "logits") if name in factors})

        # First of all hooks on the outputs: those of sharding look for the tensors that have gradients.
        handle = self.student.register_forward_hook(attach, prepend=True)
        try:
            with packed(without_adapters(self.student), positions), self.head.handing_on(receive):
                yield found
        finally:
            handle.remove()

    def _losses(self, hidden: torch.Tensor, batch: Batch, factors: Mapping[str, torch.Tensor]) -> HeadLosses:
        objective, nothing = self.terms.objective, hidden.new_zeros(())
        options: dict[str, Any] = {}
        labels = batch.needed_labels("losses.labels") if "labels" in factors else None
        if "logits" in factors:
            section, teacher = objective.logits, batch.target
            assert section is not None
            if section.needs_labels:
                labels = batch.needed_labels(f"losses.logits.divergence {section.divergence}")
            if isinstance(teacher, SparseSignals):
                options["targets"] = teacher.targets
            else:
                assert isinstance(teacher, HeadSignals)
                options |= {"teacher": teacher.head, "teacher_hidden": teacher.head_inputs}
            options |= {"divergence": section.divergence, "settings": section.settings()}
            options["temperature"] = value_at(section.temperature, batch.step, batch.steps)
        return head_losses(
            self.head.head,
            hidden,
            labels,
            label_weight=factors.get("labels", nothing),
            logits_weight=factors.get("logits", nothing),
            classes=self.terms.classes,
            smoothing=self.terms.smoothing,
            **options,
        )
