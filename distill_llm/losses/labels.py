"""The loss against the true labels."""

import torch
import torch.nn.functional as F

IGNORED = -100


def label_loss(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross-entropy of each item, or squared error where the labels are not class ids.

    Args:
        logits: (items, classes); (items, 1) for regression.
        labels: (items,) class ids, -100 for items without a label; floats for regression.
        smoothing: share of the target spread evenly over the classes (classification only).

    Returns:
        (items,) in fp32, in nats or in squared units of the label; 0 where there is no label.
    """
    if logits.shape[-1] == 1:
        return (logits.float().squeeze(-1) - labels.float()).square()
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
