"""Gradients of the loss with respect to the weights of a model's layers, summed over examples while the weights stay frozen."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from distill_llm.models.masks import linears_of
from distill_llm.pruning.statistics.hooks import CalibrationBatch


class WeightGradients:
    """Running sums, fp32, of the gradients of the linears inside the layers.

    Attributes:
        sums: by the name of a weight, in its shape.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device):
        self.linears = linears_of(model)
        self.sums = {
            f"{name}.weight": torch.zeros(module.weight.shape, device=device) for name, module in self.linears.items()
        }

    def watch(self, batch: CalibrationBatch) -> list:
        """Hooks on the linears, as handles."""
        return [
            module.register_forward_hook(_hook(batch, self.sums[f"{name}.weight"]))
            for name, module in self.linears.items()
        ]


def _hook(batch: CalibrationBatch, total: torch.Tensor) -> Callable:
    """After a linear: the sum over tokens of g x^T, with x what entered and g the gradient of the loss at what came out."""

    def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if batch.skipped or not output.requires_grad:
            return
        entering = args[0].detach()

        def backward(gradient: torch.Tensor) -> None:
            with torch.no_grad(), batch.fp32():
                left, right = gradient.float(), entering.float()
                if (by_token := batch.by_token(left)) is not None:
                    left = by_token * batch.mask.unsqueeze(-1)
                left, right = left.flatten(0, -2), right.flatten(0, -2)
                total.add_(right.T @ left if isinstance(module, Conv1D) else left.T @ right)

        output.register_hook(backward)

    return hook
