"""What is recorded of a forward: hidden states, inputs of attention probabilities, queries, keys and values."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.utils.generic import is_flash_attention_requested

from distill_llm.common.errors import InputError
from distill_llm.losses.attention import AttentionInputs
from distill_llm.losses.signals import Signals, Vectors, Wanted


@dataclass
class Recording:
    """What one forward left behind, by layer: (B, T, H) outputs, inputs of attention probabilities, vectors, neurons."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    vectors: dict[int, Vectors] = field(default_factory=dict)
    neurons: dict[int, torch.Tensor] = field(default_factory=dict)
    wanted: Wanted = field(default_factory=Wanted)
    _biases: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list, repr=False)

    def with_logits(self, logits: torch.Tensor) -> Signals:
        """The recording and the logits, (B, C) or (items, V)."""
        return Signals(self.hidden, self.attention, self.vectors, self.neurons, logits=logits)

    def add_attention(
        self,
        index: int,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        settings: dict[str, Any],
    ) -> None:
        """Keep what an attention function was called with; the first call of a layer counts (self-attention)."""
        if index in self.attention:
            return
        if (beyond := _beyond_the_mask(module, query.shape[2], mask, settings)) is not None:
            accepted = "a model with plain softmax attention (for windows and packed rows: attn_implementation sdpa)"
            raise InputError(self.wanted.field("attention"), f"{type(module).__name__} with {beyond}", accepted)
        if key.shape[1] != query.shape[1]:
            key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scaling, causal = settings.get("scaling"), settings.get("is_causal")
        scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        causal = bool(getattr(module, "is_causal", False) if causal is None else causal)
        self.attention[index] = AttentionInputs(query, key, scaling, self._bias(mask, causal, query))

    def _bias(self, mask: torch.Tensor | None, causal: bool, query: torch.Tensor) -> torch.Tensor | None:
        if mask is None:
            return additive_bias(None, causal, query)
        for known, bias in self._biases:
            if known is mask:
                return bias
        self._biases.append((mask, additive_bias(mask, causal, query)))
        return self._biases[-1][1]


def _beyond_the_mask(module: nn.Module, length: int, mask: torch.Tensor | None, settings: dict[str, Any]) -> str | None:
    """What changes attention probabilities besides the mask that the kernel was given; None: nothing does."""
    for name in ("softcap", "position_bias", "s_aux"):
        if settings.get(name) is not None:
            return name
    if not is_flash_attention_requested(getattr(module, "config", None)):
        return None
    # The mask of flash attention is of padding alone.
    window, positions = settings.get("sliding_window"), settings.get("position_ids")
    if window is not None and length > window:
        return f"a sliding window of {window} under flash attention"
    one_row = mask is None and positions is not None and len(positions) == 1
    if one_row and bool((positions.diff(dim=-1) != 1).any()):
        return "packed rows under flash attention"
    return None


def additive_bias(mask: torch.Tensor | BlockMask | None, causal: bool, query: torch.Tensor) -> torch.Tensor | None:
    """Any kernel's mask as an additive fp32 one, -3.4e38 (never minus infinity) where a key is hidden."""
    length, lowest = query.shape[2], torch.finfo(torch.float32).min
    if isinstance(mask, BlockMask):  # of flex attention, a rule for pairs of tokens
        batch, heads = mask.shape[:2]
        mask = create_mask(mask.mask_mod, batch, heads, length, length, device=query.device)
    if mask is None:
        if not causal or length == 1:
            return None
        hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
        return torch.zeros(1, 1, length, length, device=query.device).masked_fill_(hidden, lowest)
    if mask.dim() == 2:
        bias = torch.zeros(mask.shape, device=mask.device).masked_fill_(mask == 0, lowest)[:, None, None, :]
        future = additive_bias(None, causal, query)
        return bias if future is None else torch.minimum(bias, future)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, lowest)
    return mask.float().clamp(min=lowest)
