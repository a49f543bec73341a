"""A Trainer whose loss has parameters of its own, the projections of hidden states, and a state of its own.

They belong to the loss. They are optimised, clipped and checkpointed with the run, and never part of the student.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer

from distill_llm.common.errors import InputError
from distill_llm.training import memories, projections
from distill_llm.training.shards import clip_with
from distill_llm.training.terms import Terms


class ProjectingTrainer(Trainer):
    """Trains the projections of `terms` together with the model.

    Attributes:
        terms: of the loss; a subclass sets it.
    """

    terms: Terms

    def _check_scheduler(self) -> None:
        """Refuse a scheduler that was given, where there are projections: it belongs to an optimizer without them."""
        if len(self.terms.projections) and self.lr_scheduler is not None:
            accepted = "an optimizer without a scheduler: the projections of hidden states join the optimizer"
            raise InputError("optimizers", type(self.lr_scheduler).__name__, accepted)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; averages the projections' gradients over processes, as DDP does the student's."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for parameter in self.terms.projections.parameters():
                if parameter.grad is not None:
                    parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.is_fsdp_enabled:
            return self._clip_shards(model, self.args.max_grad_norm)
        learned = nn.ModuleList([model, self.terms.projections])
        if not self._sees_all_gradients:
            return super()._clip_grad_norm(learned)
        # As torch's clip_grad_norm_, but gradients that are short enough are not multiplied by 1.
        norm = get_total_norm(_gradients(learned))
        if norm + 1e-6 > self.args.max_grad_norm:
            clip_grads_with_norm_(learned.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.is_fsdp_enabled:
            return self._clip_shards(model, float("inf"))
        learned = nn.ModuleList([model, self.terms.projections])
        if grad_norm is None and self._sees_all_gradients:
            return get_total_norm(_gradients(learned))
        return super()._get_grad_norm(learned, grad_norm)

    def _clip_shards(self, model: nn.Module, longest: float) -> torch.Tensor:
        norm = super()._get_grad_norm(model)  # accelerate knows the model by the list of its own parameters
        return clip_with(norm, model.parameters(), self.terms.projections.parameters(), longest)

    @property
    def _sees_all_gradients(self) -> bool:
        """Whether each process holds whole gradients, and looking at their norm makes no device wait."""
        return self.args.device.type == "cpu" and not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As `Trainer.create_scheduler`; before, the projections join the optimizer, which is wrapped by now."""
        assert self.optimizer is not None
        projections.join(self.optimizer, self.terms.projections, self.args.weight_decay)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None
        with projections.apart(self.optimizer, self.terms.projections):
            super()._save_optimizer_and_scheduler(output_dir)
        if len(self.terms.projections) and self.args.should_save:
            projections.save(self.optimizer, self.terms.projections, output_dir)
        if self.args.should_save:
            memories.save(self.terms.memories, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert self.optimizer is not None
        with projections.apart(self.optimizer, self.terms.projections):
            super()._load_optimizer_and_scheduler(checkpoint)
        if len(self.terms.projections) and checkpoint is not None:
            projections.load(self.optimizer, self.terms.projections, checkpoint)
        if checkpoint is not None:
            memories.load(self.terms.memories, checkpoint)


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
