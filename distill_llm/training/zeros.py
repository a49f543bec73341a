"""Training of a sparse student: weights that its masks removed stay zero."""

from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from distill_llm.common.errors import InputError
from distill_llm.models.adapters import without_adapters
from distill_llm.models.masks import Masks, linears_of


class KeepZeros(TrainerCallback):
    """Keeps the zeros of a student through training, whatever the optimizer.

    The gradients of removed weights are set to zero as they come, so that they count neither for the gradient's norm nor for the
    optimizer's moments, and the weights themselves after every step: weight decay leaves a zero alone, but not every
    optimizer takes a step of nothing where the gradient is zero.

    Args:
        masks: of the student. On the device they take a byte for each weight.

    Raises:
        InputError: when the training begins: the masks are of another model, the model is divided among processes, or only
            adapters are trained.
    """

    def __init__(self, masks: Masks):
        self.masks = masks
        self._held: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Once the weights of a checkpoint are read."""
        model: PreTrainedModel = kwargs["model"]
        if without_adapters(model) is not model:
            raise InputError(
                "model", type(model).__name__, "a model without adapters: merged, they would fill its zeros"
            )
        self.masks.check(model)
        linears = linears_of(model)
        self._held = [
            (linears[name].weight, ~mask.to(linears[name].weight.device)) for name, mask in self.masks.kept.items()
        ]
        if any(type(weight.data) is not torch.Tensor for weight, _ in self._held):
            raise InputError("fsdp", "a model divided among processes", "DDP: the masks are of whole weights")
        self._hooks = [weight.register_hook(_without(gone)) for weight, gone in self._held]
        self._set()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After every optimizer step."""
        self._set()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The student is a plain model again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._held = [], []

    @torch.no_grad()
    def _set(self) -> None:
        for weight, gone in self._held:
            weight.masked_fill_(gone, 0.0)


def _without(gone: torch.Tensor) -> Any:
    return lambda gradient: gradient.masked_fill(gone, 0.0)
