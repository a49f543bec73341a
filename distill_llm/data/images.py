"""Batches of images."""

import numpy as np
import torch
from torch import Tensor

from distill_llm.data.padding import Features


class ImageCollator:
    """Stacks rows with `pixel_values` (C, h, w) and `labels`.

    Args:
        tokens: of an image inside the models (see `distill_llm.measuring.images.image_tokens`): batches then say that all of
            them count, which losses of layers and statistics need. None: batches for outputs alone, whatever the models are.
    """

    def __init__(self, tokens: int | None = None):
        self.tokens = tokens

    def __call__(self, features: Features) -> dict[str, Tensor]:
        """One batch: `pixel_values` (B, C, h, w) fp32, `labels` (B,) if any, and `attention_mask` (B, T)."""
        images = torch.as_tensor(np.stack([np.asarray(row["pixel_values"], dtype=np.float32) for row in features]))
        batch = {"pixel_values": images}
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([int(row["labels"]) for row in features])
        if self.tokens is not None:
            batch["attention_mask"] = torch.ones(len(images), self.tokens, dtype=torch.long)
        return batch
