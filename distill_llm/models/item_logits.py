"""Logits at chosen positions only, so that a language model never makes all (B, T, V) of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.architectures.families import row_of
from distill_llm.losses.items import is_language_model, kind_of


@contextmanager
def packed(model: PreTrainedModel, positions: torch.Tensor | None) -> Iterator[None]:
    """Hand a language model's head the hidden states at `positions` only: its logits are (items, V), not (B, T, V).

    What the model does to its logits afterwards (scales, soft caps) still happens.

    Args:
        model: any masked or causal language model; others, such as token classification, stay as they are.
        positions: (items,) indices into the flattened (B * T) tokens; None packs nothing.
    """
    head = None if positions is None else _language_model_head(model)
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda module, args: (args[0].flatten(0, 1)[positions], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def item_logits(logits: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """(B, T, V) logits at flattened token positions as (items, V); logits without a token dimension as they are."""
    return logits if positions is None or logits.dim() == 2 else logits.flatten(0, 1)[positions]


def _language_model_head(model: PreTrainedModel) -> nn.Module | None:
    """The first module of the head, or the vocabulary's linear; both take hidden states (B, T, H)."""
    if not is_language_model(model):
        return None
    if kind_of(model) == "next_token":
        return model.get_output_embeddings()
    row = row_of(model.config)
    return model.get_output_embeddings() if row is None else model.get_submodule(row.mlm_head)
