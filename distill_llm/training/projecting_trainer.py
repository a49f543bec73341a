"""A Trainer whose loss trains more than the student (projections of hidden states, peers), and has a state of its own.

They belong to the loss. They are optimised, clipped and checkpointed with the run, and never part of the student.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer

from distill_llm.common.errors import InputError
from distill_llm.training import companions, memories
from distill_llm.training.companions import Companion
from distill_llm.training.shards import clip_with
from distill_llm.training.terms import Terms


class ProjectingTrainer(Trainer):
    """Trains the companions of a loss together with the model.

    Attributes:
        terms: of the loss; a subclass sets it.
        companions: what learns with the model, with parameters; a subclass sets it.
    """

    terms: Terms
    companions: list[Companion]
    _norms_alone: tuple[torch.Tensor, ...] = ()

    def _check_scheduler(self) -> None:
        """Refuse a scheduler that was given, where something joins its optimizer."""
        if self.companions and self.lr_scheduler is not None:
            accepted = f"an optimizer without a scheduler: {self.companions[-1].what} join the optimizer"
            raise InputError("optimizers", type(self.lr_scheduler).__name__, accepted)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`; averages the companions' gradients over processes, as DDP does the student's."""
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for companion in self.companions:
                if found := companion.gradients:
                    mean = self.accelerator.reduce(torch.cat([each.flatten() for each in found]), reduction="mean")
                    for gradient, part in zip(found, mean.split([each.numel() for each in found]), strict=True):
                        gradient.copy_(part.view_as(gradient))
        return loss

    def _without_gradients(self) -> None:
        """Forget the companions' gradients."""
        for companion in self.companions:
            for parameter in companion.parameters:
                parameter.grad = None

    def _learned(self, model: nn.Module) -> nn.ModuleList:
        """The model and what is clipped with it."""
        return nn.ModuleList([model, *(each.module for each in self.companions if not each.alone)])

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        longest = self.args.max_grad_norm
        if self.is_fsdp_enabled:
            return self._clip_shards(model, longest)
        learned = self._learned(model)
        if not self._sees_all_gradients:
            norm = super()._clip_grad_norm(learned)
        else:  # as torch's clip_grad_norm_, but gradients that are short enough are not multiplied by 1
            norm = get_total_norm(_gradients(learned))
            if norm + 1e-6 > longest:
                clip_grads_with_norm_(learned.parameters(), longest, norm)
        self._measure_alone()
        for companion, own in zip(self._alone, self._norms_alone, strict=True):
            clip_grads_with_norm_(companion.parameters, longest, own)
        return norm

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self.is_fsdp_enabled:
            return self._clip_shards(model, float("inf"))
        if grad_norm is None:
            self._measure_alone()
            if self._sees_all_gradients:
                return get_total_norm(_gradients(self._learned(model)))
        return super()._get_grad_norm(self._learned(model), grad_norm)

    @property
    def _alone(self) -> list[Companion]:
        return [each for each in self.companions if each.alone]

    def _measure_alone(self) -> None:
        self._norms_alone = tuple(get_total_norm(each.gradients) for each in self._alone)

    def _norm_of_all(self, norm: Any) -> Any:
        """The norm of the student's gradients together with those of its peers; None where that of the student is not known."""
        if norm is None or not self._norms_alone:
            return norm
        own = torch.as_tensor(norm).to(self._norms_alone[0])
        return torch.stack([own, *self._norms_alone]).norm()

    def _clip_shards(self, model: nn.Module, longest: float) -> torch.Tensor:
        norm = super()._get_grad_norm(model)  # accelerate knows the model by the list of its own parameters
        return clip_with(norm, model.parameters(), self.terms.projections.parameters(), longest)

    @property
    def _sees_all_gradients(self) -> bool:
        """Whether each process holds whole gradients, and looking at their norm makes no device wait."""
        return self.args.device.type == "cpu" and not self.is_fsdp_enabled and not self.is_deepspeed_enabled

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As `Trainer.create_scheduler`; before, the companions join the optimizer, which is wrapped by now."""
        assert self.optimizer is not None
        companions.join(self.optimizer, self.companions, self.args.weight_decay)
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        assert self.optimizer is not None
        with companions.apart(self.optimizer, self.companions):
            super()._save_optimizer_and_scheduler(output_dir)
        for companion in self.companions if self.args.should_save else ():
            companions.save(self.optimizer, companion, output_dir)
        if self.args.should_save:
            memories.save(self.terms.memories, output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        assert self.optimizer is not None
        with companions.apart(self.optimizer, self.companions):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            for companion in self.companions:
                companions.load(self.optimizer, companion, checkpoint)
            memories.load(self.terms.memories, checkpoint)


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
