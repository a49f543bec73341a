"""Which parts of a batch a model's forward takes, and whether its rows hold several sequences."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import is_flash_attention_requested

from distill_llm.common.errors import InputError, raise_all
from distill_llm.data.decoders import is_decoder, packing_faults
from distill_llm.losses.items import kind_of_class, sequence_numbers

BORDERS = ("cu_seq_lens_q", "seq_idx")
"""What collators say of the borders of sequences besides `position_ids`; most models do not read it."""


def packed_sequences(model: nn.Module, batch: Mapping[str, Any]) -> torch.Tensor | None:
    """(B, T) the number of each token's sequence, where rows of a batch for a decoder hold several; None: a sequence per row.

    Rows are packed where positions start again among the tokens that are not padding (see `sequence_numbers`). The positions
    of an encoder, of rows padded on the left, or those that begin at another number than 0, change nothing else.
    The device is waited for only where a decoder is given `position_ids`.

    Raises:
        InputError: the model would mix the sequences of a row: its family does, flash attention does in a batch of several
            rows, or only what it does not read says where sequences begin.
    """
    if "position_ids" not in batch and (named := [name for name in BORDERS if name in batch]):
        fix = "let the collator return position_ids too: they keep the sequences of a row apart"
        raise InputError("position_ids", f"a batch with {named[0]} alone", fix=fix)
    config = getattr(model, "config", None)
    if "position_ids" not in batch or config is None:
        return None
    # A config names no class before it is saved: whether a family with both heads (BERT) is a decoder, only the class says.
    if kind_of_class(type(model).__name__) != "next_token" and not is_decoder(config):
        return None
    numbers = sequence_numbers(batch)
    if numbers is None or not numbers.any():
        return None
    raise_all(packing_faults(config.model_type, "position_ids"))
    if len(numbers) > 1 and is_flash_attention_requested(config):
        given = f"{len(numbers)} packed rows in a batch under flash attention"
        raise InputError("position_ids", given, "batches of one row, or the attn_implementation sdpa")
    return numbers


def forward_inputs(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the model's forward names (all of them where it names none), without labels, and with no cache.

    Of a packed batch (see `packed_sequences`), the model gets no attention mask: where positions start again, transformers
    makes the mask that keeps sequences apart, but only if it is given no other and no cache. Padding has position 0 then, and
    is a sequence of its own. Losses and statistics use the whole batch with its attention mask.

    Of rows of embeddings (`inputs_embeds`) the model gets these, in its dtype, and no `input_ids`: they only give the shape.

    Raises:
        InputError: the model would mix the sequences of a packed row.
    """
    if packed_sequences(model, inputs) is not None and inputs.get("attention_mask") is not None:
        positions = inputs["position_ids"].expand_as(inputs["input_ids"])
        inputs = {**inputs, "position_ids": positions.masked_fill(inputs["attention_mask"] == 0, 0)}
        del inputs["attention_mask"]
    if "inputs_embeds" in inputs and "input_ids" in inputs:
        dtype = getattr(model, "dtype", None)
        inputs = {**inputs, "inputs_embeds": inputs["inputs_embeds"].to(dtype)}
        del inputs["input_ids"]
    names = inspect.signature(model.forward).parameters
    everything = "input_ids" not in names
    chosen = {name: value for name, value in inputs.items() if name != "labels" and (everything or name in names)}
    return {**chosen, "use_cache": False} if "use_cache" in names else chosen
