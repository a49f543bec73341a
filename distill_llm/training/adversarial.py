"""A trainer whose rows are made as the student learns: by a generator that looks for what student and teacher disagree on."""

import os
from typing import Any

import torch

from distill_llm.common.errors import InputError, raise_all
from distill_llm.losses.terms.term import Use
from distill_llm.synthesis.generator import Adversary
from distill_llm.training.shards import sharding_of
from distill_llm.training.trainer import DistillationTrainer

STATE = "generator.pt"
"""The generator, in a checkpoint."""


class AdversarialTrainer(DistillationTrainer):
    """Trains a student on the inputs of a generator, and the generator against the student (Fang et al., 2019).

    Before every so many of the student's steps the generator takes one of its own; then it makes the inputs of each batch. The
    rows of `train_dataset` say how many there are in an epoch, and nothing else of them is read. What the student learns from the
    teacher is the objective's matter, as for any rows. An evaluation reads rows as they are.

    Args:
        adversary: the generator, of a space that teacher and student read.
        args, kwargs: as of `DistillationTrainer`.

    Raises:
        InputError: the teacher is no model in memory, the objective needs labels, or the student is sharded.
    """

    def __init__(self, *args: Any, adversary: Adversary, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.adversary = adversary
        if self.teacher is None or self.teacher.model is None:
            raise InputError("teacher", None, "a model in memory, which the generator is differentiated through")
        raise_all(self.objective.faults(Use(unlabelled="rows of a generator")))
        if (sharding := sharding_of(self)) is not None:
            accepted = "DDP, or one process: each holds the whole generator and reads the whole student"
            raise InputError("adversary", f"a student sharded by {sharding}", accepted)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The micro-batches of one optimizer step, as the generator makes them, and their item counts."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        step, teacher = self.state.global_step, self.teacher.model if self.teacher is not None else None
        assert teacher is not None
        if step % self.adversary.settings.every == 0:
            student = self.accelerator.unwrap_model(self.model)
            self.adversary.learn(teacher, student, step)
        made = []
        for number, batch in enumerate(batches):
            rows = len(next(iter(batch.values())))
            made.append(self.adversary.fill({}, rows, step, self._place(number)))
        return made, self._get_num_items_in_batch(made, device)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.adversary.state_dict(), os.path.join(output_dir, STATE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            file = os.path.join(checkpoint, STATE)
            self.adversary.load_state_dict(torch.load(file, map_location=self.args.device, weights_only=True))
