"""Examples that a model reads as mixtures of two: their embeddings are added where the model makes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


@contextmanager
def mixed_embeddings(model: PreTrainedModel, batch: Mapping[str, Any]) -> Iterator[None]:
    """In the one forward inside the context, tokens have the embeddings of `input_ids` and of `mixed_ids` in the batch's shares.

    Each model mixes its own embeddings, of any width, before it adds those of positions (MixKD, Liang et al., 2021, section
    3.2).

    Args:
        batch: without the columns of `data.augmenting.collator.mixture` nothing is done.
    """
    if "mixed_ids" not in batch:
        yield
        return
    ids, shares = batch["mixed_ids"], batch["mixed_shares"]

    def mix(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        own, other = shares.to(output.dtype).split(1, dim=-1)
        return output * own + module.forward(ids) * other

    handle = model.get_input_embeddings().register_forward_hook(mix)
    try:
        yield
    finally:
        handle.remove()
