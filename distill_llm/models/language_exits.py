"""Exits of causal language models: states after some layers, read by the model's own final norm and head (LayerSkip)."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from distill_llm.architectures.families import layers_of
from distill_llm.common.errors import InputError
from distill_llm.losses.items import kind_of
from distill_llm.losses.signals import TokenExits
from distill_llm.models.output_head import OutputHead

END = "ForCausalLM"
DRAFTING_FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "smollm3",
    "granite",
    "olmo2",
    "cohere",
)
"""Families whose forward runs as many layers as its config says, then `norm`, then the head: their first layers can draft."""


def language_exit_fault(
    config: PreTrainedConfig, model_class: str, after: Sequence[int]
) -> tuple[str, Any, str] | None:
    """As `exit_fault`, of a causal language model."""
    if config.model_type not in DRAFTING_FAMILIES:
        return "", model_class, f"a ...{END} model of {', '.join(DRAFTING_FAMILIES)}"
    layers = config.num_hidden_layers
    if not after or list(after) != sorted(set(after)) or not all(0 < count < layers for count in after):
        return "after", list(after), f"numbers of layers from 1 to {layers - 1}, in rising order"
    return None


def language_exits(model: PreTrainedModel) -> list[int]:
    """After how many layers a causal language model has exits; empty: it has none, or is another model."""
    said = getattr(model.config, "exits", None)
    return list(said["after"]) if said and kind_of(model) == "next_token" else []


class ExitReader:
    """Reads the exits of a language model in its forward.

    Args:
        model: with exits.
        head: its output map.

    Raises:
        InputError: naming `model`: the head cannot be run apart from it.
    """

    def __init__(self, model: PreTrainedModel, head: OutputHead | None):
        if head is None:
            raise InputError("model", type(model).__name__, "a model with exits whose head is a plain linear map")
        self.model, self.head = model, head
        base: Any = model.base_model
        self.norm: nn.Module = base.norm
        layers = layers_of(model)
        self.layers = [layers[count - 1] for count in language_exits(model)]

    @contextmanager
    def reading(self, positions: torch.Tensor) -> Iterator[list[TokenExits]]:
        """Within the context, a forward whose head gets the items at `positions` alone leaves what the exits give.

        Args:
            positions: (items,) of the flattened tokens.
        """
        kept: dict[int, torch.Tensor] = {}
        found: list[TokenExits] = []

        def keep(place: int) -> Any:
            def hook(module: nn.Module, args: tuple, output: Any) -> None:
                states = output[0] if isinstance(output, tuple) else output
                kept[place] = states.flatten(0, 1)[positions]

            return hook

        def read(module: nn.Module, args: tuple) -> None:
            early = [self.norm(kept[place]) for place in range(len(self.layers))]
            found.append(TokenExits((*early, args[0]), self.head.head))

        with ExitStack() as stack:
            for place, layer in enumerate(self.layers):
                stack.callback(layer.register_forward_hook(keep(place)).remove)
            stack.callback(self.head.linear.register_forward_pre_hook(read).remove)
            yield found
