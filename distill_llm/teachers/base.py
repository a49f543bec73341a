"""What training asks of a teacher. A new kind of teacher is one file with a subclass (docs/development/add-a-teacher.md)."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.losses.signals import Signals, Wanted
from distill_llm.losses.terms.term import Gives


class Teacher(ABC):
    """Gives the signals that a student learns from.

    A trainer asks, in this order: `gives` and `meet` when it is made, then `place`; `load_state_dict` where a training is
    resumed; `begin`; `prefetch` in the data loader and `signals` for every micro-batch; `after_step` after every optimizer step;
    `state_dict` for every checkpoint; `close` when the training has ended. Only `meet` and `signals` must be written.

    Attributes:
        model: the model whose layers are compared with the student's; None of a teacher that gives logits alone.
        compact: whether it can give the outputs of a language model without whole logits, as HeadSignals or SparseSignals.
        prefetches: whether `prefetch` is to be called for the batches of training.
        whole_student: whether it reads the student's weights, or trains models of its own: every process must have all weights.
        columns: of the rows, besides those that models read, that batches are to have.
    """

    model: PreTrainedModel | None = None
    compact: bool = False
    prefetches: bool = False
    whole_student: bool = False
    columns: tuple[str, ...] = ()

    @property
    def gives(self) -> Gives:
        """What it can give, under its name in messages; objectives that need more are refused. By default: logits."""
        return Gives(f"a {type(self).__name__}")

    @property
    def readers(self) -> tuple[PreTrainedModel, ...]:
        """Models that read batches: columns that they take are kept, and rows must fit them. By default `model` alone."""
        return () if self.model is None else (self.model,)

    @property
    def learners(self) -> Sequence[PreTrainedModel]:
        """Models that learn with the student, by the same objective; by default none."""
        return ()

    def exchange(self, own: Signals) -> list[tuple[Signals, Signals]]:
        """What each of the learners says of the batch of the last `signals`, with its graph, and what it learns from.

        Args:
            own: the student's signals of that batch.
        """
        return []

    @abstractmethod
    def meet(self, student: PreTrainedModel, tokenizer: Any = None) -> int | None:
        """Get to know the student, which may be kept: it is the model that is trained, without adapters or wrappers.

        Args:
            tokenizer: of the data, if the trainer has one.

        Returns:
            How many leading logits of student and teacher mean the same; None: all of them.

        Raises:
            InputError: the student cannot learn from this teacher.
        """

    def place(self, device: torch.device, dtype: torch.dtype | None = None, layers: Wanted | None = None) -> None:
        """Get ready.

        Args:
            device: where the student trains, and batches and signals are.
            dtype: what weights are to be held in; None leaves them as they are.
            layers: of `model`, whose signals are wanted; None: none.
        """
        return

    def begin(self, steps: int) -> None:
        """A training begins, or goes on; `steps`: optimizer steps of the whole training."""
        return

    def watch(self, layers: Wanted) -> None:
        """From now on record these layers, which are among those of `place`: the others are not asked for."""
        return

    @abstractmethod
    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """The signals of a batch, without gradients.

        Args:
            batch: as the collator made it, on the student's device: `input_ids` (B, T) and what goes with them.
            step: optimizer steps done.
            positions: (items,) indices into the flattened (B * T) tokens; logits are (items, V), of these tokens alone. None:
                of a model with an output per example logits are (B, C).
            compact: give outputs without whole logits; asked only of a teacher that is `compact`.
        """

    def prefetch(self, batch: Mapping[str, torch.Tensor], positions: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Columns to add to a batch before it goes to the device, where `prefetches` is set.

        Called in the processes of the data loader: the teacher is pickled to get there.

        Args:
            batch, positions: as of `signals`, on the CPU.
        """
        return {}

    def after_step(self, step: int) -> None:
        """The optimizer has changed the student; `step`: optimizer steps done."""
        return

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs: tensors and plain values. It goes into every checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, with tensors on the CPU."""
        return

    def close(self) -> None:
        """Let go of what can be had again, such as connections: `signals` may be called again for another training."""
        return
