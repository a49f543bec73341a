"""Which parts of a batch a model's forward takes."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from distill_llm.common.errors import InputError
from distill_llm.data.decoders import without_packed_mask


def forward_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the model's forward names (all of them where it names none), without labels, and with no cache.

    A packed batch goes without its attention mask (see `distill_llm.data.decoders.without_packed_mask`).

    Raises:
        InputError: several packed rows under flash attention, which keeps sequences apart in a batch of one row only.
    """
    rows = len(inputs.get("position_ids", ()))
    if rows > 1 and is_flash_attention_requested(getattr(model, "config", None)):
        given = f"{rows} packed rows in a batch under flash attention"
        raise InputError("position_ids", given, "batches of one row, or the attn_implementation sdpa")
    names, inputs = inspect.signature(model.forward).parameters, without_packed_mask(inputs)
    everything = "input_ids" not in names
    chosen = {name: value for name, value in inputs.items() if name != "labels" and (everything or name in names)}
    return {**chosen, "use_cache": False} if "use_cache" in names else chosen
