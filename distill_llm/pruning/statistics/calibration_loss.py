"""What a calibration pass differentiates: the losses of its examples, summed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.losses.divergences import forward_kl
from distill_llm.losses.items import ITEMS, kind_of, targets, valid_tokens
from distill_llm.losses.labels import label_loss
from distill_llm.models.inputs import forward_inputs
from distill_llm.models.item_logits import item_logits, packed

Batch = Mapping[str, torch.Tensor]
Loss = str | Callable[[Any, Batch], torch.Tensor]
SPAN = ("start_positions", "end_positions")


def calibration_loss(
    model: PreTrainedModel, batch: Batch, loss: Loss | None, teacher: PreTrainedModel | None, generator: torch.Generator
) -> torch.Tensor | None:
    """One forward pass and the sum of its examples' losses (see `collect_statistics`) in fp32; None without a loss.

    Raises:
        InputError: a batch without the labels that the loss needs, or with several for an example.
    """
    if loss is None or callable(loss):
        outputs = model(**_inputs(model, batch))
        return None if loss is None else loss(outputs, batch)
    logits, labels = items_of(model, batch, labelled=loss == "labels")
    regression = logits.shape[-1] == 1
    if loss == "kl" and teacher is not None:
        with torch.no_grad():
            target, _ = items_of(teacher, batch, labelled=False)
        return divergences(target, logits).sum()
    if loss == "kl":
        predicted = logits.detach()
        if not predicted.amax(-1).isfinite().all():  # nothing can be drawn from these
            return predicted.sum() * torch.nan
        if regression:
            labels = predicted + torch.randn(predicted.shape, generator=generator, device=logits.device)
        else:
            labels = torch.multinomial(predicted.softmax(-1), 1, generator=generator).squeeze(-1)
    assert labels is not None
    return label_loss(logits, labels).sum()


def items_of(model: PreTrainedModel, batch: Batch, labelled: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One forward pass: logits (items, C) in fp32 of the outputs that count, and their labels (items,) if `labelled`.

    An item is an example; with one output per token, a token; in question answering, a start or an end, whose C classes are
    the example's tokens without padding.

    Raises:
        InputError: a batch without labels where they are asked for, or without exactly one label for each item.
    """
    kind, spans = kind_of(model), type(model).__name__.endswith("ForQuestionAnswering")
    names = SPAN if spans else ("labels",)
    if labelled and not set(names) <= batch.keys():
        raise InputError("dataloader", sorted(batch), f"batches with {' and '.join(names)}, or loss='kl'")
    positions, labels = None, None
    if kind != "example":
        positions, labels = targets(batch if labelled else {k: v for k, v in batch.items() if k != "labels"}, kind)
    elif labelled:
        labels = torch.cat([batch[name].flatten() for name in names])
    with packed(model, positions):
        outputs = model(**_inputs(model, batch))
    _check_outputs(model, outputs, per_example=kind == "example" and not spans)
    if not spans:
        logits = item_logits(outputs.logits, positions).float()
        if labels is not None:
            _check_labels(logits, labels, batch["labels"])
        return logits, labels
    padding = ~valid_tokens(batch)
    logits = torch.cat([each.float().masked_fill(padding, torch.finfo(torch.float32).min) for each in outputs[:2]])
    if labels is None:
        return logits, None
    inside = (labels >= 0) & (labels < padding.shape[-1])  # an answer that was cut off has no label
    return logits[inside], labels[inside]


def _check_outputs(model: PreTrainedModel, outputs: Any, per_example: bool) -> None:
    """Refuse a head whose outputs nobody knows the labels of: one without logits, or of another kind than its name says."""
    name, logits = type(model).__name__, getattr(outputs, "logits", None)
    known = f"a model whose class ends in {', '.join(ITEMS)}, or a loss that is a callable or None"
    if logits is None and "start_logits" not in outputs:
        raise InputError("model", f"{name}, which has no logits", known)
    if per_example and (logits.dim() != 2 or name.endswith("ForPreTraining")):  # ELECTRA's has a value for each token
        raise InputError("model", f"{name} with logits of shape {list(logits.shape)}", known)


def _check_labels(logits: torch.Tensor, labels: torch.Tensor, given: torch.Tensor) -> None:
    """Refuse labels that are not one for each item: several classes of an example, or their shares."""
    classes = logits.shape[-1]
    if len(labels) != len(logits) or (classes > 1 and labels.is_floating_point()):
        accepted = (
            "one value for each" if classes == 1 else f"one whole number for each, of {classes} classes, or loss='kl'"
        )
        raise InputError("labels", f"{given.dtype} of shape {list(given.shape)}", accepted)


def divergences(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(items,) KL(target || own) of logits (items, C), or, of a regression (C = 1), their squared differences."""
    if logits.shape[-1] == 1:
        return (logits - target).square().squeeze(-1)
    return forward_kl(logits, target)


def _inputs(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    return {name: value for name, value in forward_inputs(model, batch).items() if name not in SPAN}
