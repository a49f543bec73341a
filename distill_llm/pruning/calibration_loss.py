"""What a calibration pass differentiates: the sum over examples of their losses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.capture import item_logits, packed
from distill_llm.errors import InputError
from distill_llm.losses.items import kind_of, targets
from distill_llm.teachers.online import forward_inputs

Loss = str | Callable[[Any, Mapping[str, torch.Tensor]], torch.Tensor]


def run(
    model: PreTrainedModel,
    batch: Mapping[str, torch.Tensor],
    loss: Loss | None,
    teacher: PreTrainedModel | None,
    generator: torch.Generator,
) -> None:
    """Forward, and backward from the sum over examples of their losses."""
    inputs, kind = forward_inputs(model, batch), kind_of(model)
    positions, labels = None, batch.get("labels")
    if loss is not None and not callable(loss) and kind != "example":
        positions, labels = targets(
            batch if loss == "labels" else {k: v for k, v in batch.items() if k != "labels"}, kind
        )
    with packed(model, positions):
        outputs = model(**inputs)
    if loss is not None:
        _loss(outputs, batch, inputs, positions, labels, loss, teacher, generator).backward()


def _loss(
    outputs: Any,
    batch: Mapping[str, torch.Tensor],
    inputs: Mapping[str, torch.Tensor],
    positions: torch.Tensor | None,
    labels: torch.Tensor | None,
    loss: Loss,
    teacher: PreTrainedModel | None,
    generator: torch.Generator,
) -> torch.Tensor:
    """The sum over examples of their losses, fp32."""
    if callable(loss):
        return loss(outputs, batch)
    logits = item_logits(outputs.logits, positions).float()
    regression = logits.shape[-1] == 1
    if loss == "kl" and teacher is not None:
        with torch.no_grad(), packed(teacher, positions):
            target = item_logits(teacher(**inputs).logits, positions).float()
        if regression:
            return nn.functional.mse_loss(logits, target, reduction="sum")
        return nn.functional.kl_div(logits.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)
    if loss == "kl":
        predicted = logits.detach()
        if regression:
            labels = predicted + torch.randn(predicted.shape, generator=generator, device=logits.device)
        else:
            labels = torch.multinomial(predicted.softmax(-1), 1, generator=generator).squeeze(-1)
    elif labels is None:
        raise InputError("dataloader", sorted(batch), "batches with labels, or loss='kl'")
    if regression:
        return nn.functional.mse_loss(logits.flatten(), labels.float().flatten(), reduction="sum")
    return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum")
