"""What a batch has of the items that losses are averaged over: labels, examples and valid tokens."""

from collections.abc import Mapping
from typing import Any, Literal

import torch

from distill_llm.losses.labels import IGNORED

Unit = Literal["labels", "examples", "tokens"]
UNITS: tuple[Unit, ...] = ("labels", "examples", "tokens")


def valid_tokens(batch: Mapping[str, Any]) -> torch.Tensor:
    """(B, T) of bool: not padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def labelled(batch: Mapping[str, Any], per_token: bool) -> torch.Tensor:
    """Which items have a label that counts: (B, T) of bool with an output per token, else (B,).

    An integer of -100 is no label, nor is anything at a padding token; a float is always a label.
    """
    labels = batch["labels"]
    if per_token:
        return (labels != IGNORED) & valid_tokens(batch)
    labels = labels.flatten()
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED


def count_items(batch: Mapping[str, Any], per_token: bool) -> torch.Tensor:
    """(3,) numbers of items in the order of UNITS; made without waiting for the device."""
    valid = valid_tokens(batch)
    examples = valid.new_full((), len(valid), dtype=torch.long)
    labels = examples if batch.get("labels") is None else labelled(batch, per_token).sum()
    return torch.stack([labels, examples, valid.sum()])
