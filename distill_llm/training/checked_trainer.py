"""A Trainer that looks at its numbers: a step that is not finite stops it, or is left out, and no such weights are saved."""

from typing import Any

import torch
from torch import nn

from distill_llm.common.finite import NotFinite, first_unsound, unsound_weight
from distill_llm.training.config import DistillationConfig
from distill_llm.training.projecting_trainer import ProjectingTrainer
from distill_llm.training.step_sums import GRADIENT, TEACHER, StepSums

MOST_SKIPPED = 10
"""Steps in a row that may be skipped: after more the training would go on with nothing."""
MOST_SCALED = 30
"""The same of fp16, whose loss scale begins too high on purpose and is halved until the gradients are finite."""

LEARN_SLOWER = "lower learning_rate or the weights of the losses, or train in bf16 in place of fp16"


class CheckedTrainer(ProjectingTrainer):
    """Looks once per optimizer step, together with the gradient norm; all processes decide alike.

    Attributes:
        sums: of the running step; a subclass makes it and adds to it.
    """

    args: DistillationConfig
    model: Any
    sums: StepSums

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, Any]:
        """As `Trainer.get_batch_samples`; keeps the logged loss from before the step."""
        if self.is_in_train:
            self._loss_before = self._tr_loss.clone()
        return super().get_batch_samples(*args, **kwargs)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        unsound = self.sums.unsound(self._norm_of_all(norm))
        if not unsound:
            self.sums.keep()
            return norm
        scaled = self.accelerator.scaler is not None and [*unsound] == [GRADIENT]  # the scaler leaves such a step out
        skips = scaled or self.args.on_nonfinite == "skip"
        in_vain = not self.sums.all_kept and self.sums.all_steps + 1 >= self.state.max_steps  # nothing would be learnt
        if not skips or in_vain or self.sums.in_a_row >= (MOST_SCALED if scaled else MOST_SKIPPED):
            raise self._fault(unsound, skips)
        self.sums.skip()
        self._tr_loss.copy_(self._loss_before)
        self._without_gradients()
        for parameter in model.parameters():
            parameter.grad = None  # the optimizer passes over it: weights and moments stay
        return None

    def _fault(self, unsound: dict[str, str], skipped: bool) -> NotFinite:
        """What is wrong, nearest to its cause: weights that are not finite spoil all that comes after."""
        (what, found), layer, step = next(iter(unsound.items())), None, self.state.global_step + 1
        fix = f"{LEARN_SLOWER}, or set on_nonfinite: skip"
        if skipped:
            fix = f"{LEARN_SLOWER}: {self.sums.in_a_row + 1} steps in a row were not finite"
        if what == TEACHER:
            fix = "give a teacher with finite outputs: it may overflow in its dtype, or have weights that are nan"
        elif (weight := unsound_weight(self.model)) is not None:
            what, (layer, found) = "a weight of the student", weight
        elif what == GRADIENT:
            gradients = {name: each.grad for name, each in self.model.named_parameters() if each.grad is not None}
            layer = (first_unsound(gradients) or [None])[0]
        return NotFinite(what, found, fix, layer=layer, step=step)

    def check_weights(self) -> None:
        """Refuse to go on with weights that are not finite; all processes call it together.

        Raises:
            NotFinite: names a weight of this process, or says that another process has one.
        """
        fault, step = None, self.state.global_step
        if (found := unsound_weight(self.model)) is not None:
            fault = NotFinite("a weight of the student", found[1], LEARN_SLOWER, layer=found[0], step=step)
        if self.accelerator.num_processes > 1:
            faults = torch.tensor(float(fault is not None), device=self.accelerator.device)
            if self.accelerator.reduce(faults, reduction="sum").item() and fault is None:
                where = "the part of another process"
                fault = NotFinite("a weight of the student", "nan or infinite", LEARN_SLOWER, layer=where, step=step)
        if fault is not None:
            raise fault

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `Trainer.save_model`, of finite weights."""
        self.check_weights()
        super().save_model(output_dir, _internal_call)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`: losses are means over the steps that were kept, and the skipped ones are counted."""
        sums = self.sums
        if "loss" in logs or "train_loss" in logs:
            if "loss" in logs:
                logs.update({f"loss/{name}": value for name, value in sums.means().items()})
            if sums.steps > sums.kept:
                logs["skipped_steps"] = sums.steps - sums.kept
            for name, steps, kept in (
                ("loss", sums.steps, sums.kept),
                ("train_loss", sums.all_steps, sums.all_kept),
            ):
                if name in logs:
                    logs[name] *= steps / max(kept, 1)
            sums.logged()
        super().log(logs, start_time)
