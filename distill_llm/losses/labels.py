"""The loss against the true labels."""

import torch
import torch.nn.functional as F

from distill_llm.common.errors import InputError

IGNORED = -100


def label_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each item, or squared error where the model has a single output (regression).

    Args:
        logits: (items, classes); (items, 1) for regression.
        labels: (items,) class ids; values for regression, of any shape. An integer of -100 is no label.
        smoothing: share of the target spread evenly over the classes (classification only).

    Returns:
        (items,) in fp32, in nats or in squared units of the label; 0 where there is no label.

    Raises:
        InputError: floats as the labels of several classes.
    """
    labels = labels.flatten()
    if logits.shape[-1] == 1:
        error = (logits.float().squeeze(-1) - labels.float()).square()
        return error if labels.is_floating_point() else error * (labels != IGNORED)
    if labels.is_floating_point():
        accepted = f"class ids, whole numbers, for a model with {logits.shape[-1]} classes"
        raise InputError("labels", f"{labels.dtype} of shape {list(labels.shape)}", accepted)
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
