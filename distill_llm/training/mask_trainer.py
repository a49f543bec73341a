"""A trainer whose student learns which of its heads and neurons to keep, with the weights."""

from typing import Any

import torch
from torch import nn
from transformers.trainer_utils import TrainOutput

from distill_llm.common.errors import InputError
from distill_llm.models.adapters import without_adapters
from distill_llm.pruning.learning.masks import LearnedMasks
from distill_llm.training.companions import Companion, groups_of
from distill_llm.training.config import DistillationConfig
from distill_llm.training.shards import sharding_of
from distill_llm.training.trainer import DistillationTrainer

MASKS_NAME = "learned_masks.pt"
"""The masks and their optimizer's state, in a checkpoint."""


def masked_training_faults(args: DistillationConfig) -> list[InputError]:
    """A fault for every argument that masks do not go with."""
    faults = []
    if args.load_best_model_at_end:
        fix = "set it to false while masks learn: the best weights would come without the masks that they learned with"
        faults.append(InputError("load_best_model_at_end", True, fix=fix))
    if (args.activation_checkpointing_kwargs or {}).get("use_reentrant"):
        name, fix = "activation_checkpointing_kwargs.use_reentrant", "set it to false: masks would get no gradients"
        faults.append(InputError(name, True, fix=fix))
    return faults


class MaskTrainer(DistillationTrainer):
    """Trains a student on its objective, and masks of its units with it; `masks.harden` makes a plan of them afterwards.

    The masks are in the student's optimizer, with a learning rate of their own that stays as it is: the target has to be followed
    to the end. Their gradients are clipped apart, and averaged over processes.

    Args:
        masks: of the student.
        mask_learning_rate: None: the method's usual one.
        args, kwargs: as of `DistillationTrainer`.

    Raises:
        InputError: the student has adapters or is sharded, or an argument does not go with masks.
    """

    def __init__(self, *args: Any, masks: LearnedMasks, mask_learning_rate: float | None = None, **kwargs: Any):
        self.masks, self._micro_batches = masks, 1
        self._rate = masks.learning_rate if mask_learning_rate is None else mask_learning_rate
        super().__init__(*args, **kwargs)
        self.masks.to(self.args.device)
        if without_adapters(self.model) is not self.model:
            fix = "give a model without adapters: the weights beside a mask learn with it"
            raise InputError("model", type(self.model).__name__, fix=fix)
        if (sharding := sharding_of(self)) is not None:
            raise InputError("masks", f"a student sharded by {sharding}", fix="use DDP: masks read whole layers")
        for fault in masked_training_faults(self.args):
            raise fault

    def _companions(self) -> list[Companion]:
        names = frozenset(name for name, _ in self.masks.named_parameters())
        mine = Companion(MASKS_NAME, self.masks, names, alone=True, what="learned masks", learning_rate=self._rate)
        return [*super()._companions(), mine]

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `DistillationTrainer.train`, with the masks in the student."""
        with self.masks.applied(self.accelerator.unwrap_model(self.model)):
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """The micro-batches of one optimizer step and their item counts."""
        assert self.optimizer is not None
        self.masks.progress = self.state.global_step / self.state.max_steps
        for group in groups_of(self.optimizer, self.companions[-1]):
            group["lr"] = self._rate
        batches, counts = super().get_batch_samples(*args, **kwargs)
        self._micro_batches = max(1, len(batches))
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The objective of a micro-batch and, in training, its part of the masks' penalty, which counts once a step."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        penalty = self.masks.penalty() if model.training else None
        if penalty is None:
            return found
        loss, outputs = found if return_outputs else (found, None)
        loss = loss + penalty / self._micro_batches
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `DistillationTrainer.log`, with what the masks are at: `masks/share`, `masks/target`, ..."""
        if "loss" in logs:
            logs.update({f"masks/{name}": value for name, value in self.masks.record().items()})
        super().log(logs, start_time)
