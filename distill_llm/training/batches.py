"""Batches for training: what is drawn anew in every epoch, and what a cached teacher said of their rows."""

from typing import Any

import torch
from transformers import TrainerCallback

from distill_llm.data.epochs import Epoch
from distill_llm.data.masked import MaskingCollator
from distill_llm.data.padding import Features
from distill_llm.losses.items import targets
from distill_llm.losses.units import Kind
from distill_llm.teachers.cache import CachedTeacher


class TrainingCollator:
    """Makes the batches of a data loader of training, in its workers where it has some.

    Words are masked anew in every epoch (of evaluation they stay the same). The signals of a cached teacher are looked
    up here, ahead of the device, and travel with the batch.

    Args:
        collator: makes a batch of rows.
        epoch: of the training.
        teacher: any; only a CachedTeacher is asked here.
        kind, unlabelled: what an item is (see `losses.items.counted`).
    """

    def __init__(self, collator: Any, epoch: Epoch, teacher: Any, kind: Kind, unlabelled: bool):
        self.collator = collator.at(epoch) if isinstance(collator, MaskingCollator) else collator
        self.teacher = teacher if isinstance(teacher, CachedTeacher) else None
        self.kind, self.unlabelled = kind, unlabelled

    def __call__(self, features: Features) -> dict[str, torch.Tensor]:
        """One batch, with the teacher's signals if there is a cache."""
        batch = self.collator(features)
        if self.teacher is None:
            return batch
        positions = None if self.kind == "example" else targets(batch, self.kind, self.unlabelled)[0]
        return {**batch, **self.teacher.look_up(batch, positions)}


class EpochBegins(TrainerCallback):
    """Keeps the number of a training's epoch."""

    def __init__(self, epoch: Epoch):
        self.epoch = epoch

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the first batch of an epoch, or of what a resumed training has left of it."""
        self.epoch.number = int(state.epoch or 0)
