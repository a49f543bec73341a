"""Batches for training: what is drawn anew in every epoch, and the columns that a teacher adds."""

from typing import Any

import torch
from transformers import TrainerCallback

from distill_llm.data.augmenting.collator import AugmentingCollator
from distill_llm.data.epochs import Epoch
from distill_llm.data.masked import MaskingCollator
from distill_llm.data.padding import Features
from distill_llm.losses.items import targets
from distill_llm.losses.units import Kind
from distill_llm.teachers.base import Teacher


class TrainingCollator:
    """Makes the batches of a data loader of training, in its workers where it has some.

    Words are masked, and rows augmented, anew in every epoch (in evaluation they stay the same). A teacher that prefetches
    adds its columns here, and they travel to the device with the batch.

    Args:
        collator: makes a batch of rows.
        epoch: of the training.
        teacher: kept, and sent to workers, only where it prefetches.
        kind, unlabelled: what an item is (see `losses.items.counted`).
    """

    def __init__(self, collator: Any, epoch: Epoch, teacher: Teacher | None, kind: Kind, unlabelled: bool):
        self.collator = collator.at(epoch) if isinstance(collator, MaskingCollator | AugmentingCollator) else collator
        self.columns = getattr(collator, "columns", ())  # that are kept for it
        self.teacher = teacher if teacher is not None and teacher.prefetches else None
        self.kind, self.unlabelled = kind, unlabelled

    def __call__(self, features: Features) -> dict[str, torch.Tensor]:
        """One batch, with the teacher's columns."""
        batch = self.collator(features)
        if self.teacher is None:
            return batch
        positions = None if self.kind == "example" else targets(batch, self.kind, self.unlabelled)[0]
        return {**batch, **self.teacher.prefetch(batch, positions)}


class EpochBegins(TrainerCallback):
    """Keeps the number of a training's epoch."""

    def __init__(self, epoch: Epoch):
        self.epoch = epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first batch of an epoch, or of the rest of it where a training is resumed."""
        self.epoch.number = int(state.epoch or 0)
