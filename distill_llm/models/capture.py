"""Hidden states, queries, keys and values at chosen layers of any model, during one forward, under any attention kernel.

transformers looks its attention functions up by name. `Recorder` registers, under a name of its own, a function that
hands queries, keys, values and mask of the chosen layers to the recording in progress and then calls the kernel the
model uses anyway. The model's configuration names that function during the recorded forward only.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

from distill_llm.architectures.families import layers_of, row_of
from distill_llm.common.errors import InputError
from distill_llm.losses.attention import AttentionInputs
from distill_llm.losses.items import kind_of
from distill_llm.losses.signals import EMBEDDINGS, Signals, Vectors, Wanted

PREFIX = "distill_"


@dataclass
class Recording:
    """What one forward left behind, by layer: (B, T, H) outputs, inputs of attention probabilities, vectors."""

    hidden: dict[int, torch.Tensor] = field(default_factory=dict)
    attention: dict[int, AttentionInputs] = field(default_factory=dict)
    vectors: dict[int, Vectors] = field(default_factory=dict)
    wanted: Wanted = field(default_factory=Wanted)
    _biases: list[tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=list, repr=False)

    def with_logits(self, logits: torch.Tensor) -> Signals:
        """The recording and the logits, (B, C) or (items, V)."""
        return Signals(self.hidden, self.attention, self.vectors, logits=logits)

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
        if (beyond := _beyond_the_mask(module, query.shape[2], settings)) is not None:
            accepted = "a model with plain softmax attention (windows and packed rows: with attn_implementation sdpa)"
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


_listeners: "WeakKeyDictionary[nn.Module, Callable[..., None]]" = WeakKeyDictionary()


class Recorder:
    """Records chosen layers of one model.

    Args:
        model: any transformers model; inside a wrapper such as DDP, give the inner one.
        wanted: which layers.

    Raises:
        InputError: when attention or vectors are wanted of a model that does not take its attention function by name.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted):
        self.layers, self.wanted = layers_of(model), wanted
        self.name = type(model).__name__
        self.configs = attention_configs(model)

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Record the forward that runs inside the context, but no recomputation after it (gradient checkpointing)."""
        result = Recording(wanted=self.wanted)
        with ExitStack() as stack:
            for index in self.wanted.hidden:
                if index == EMBEDDINGS:
                    handle = self.layers[0].register_forward_pre_hook(_keep_input(result), with_kwargs=True)
                else:
                    handle = self.layers[index].register_forward_hook(_keep_output(result, index))
                stack.callback(handle.remove)
            if self.wanted.attention or self.wanted.vectors:
                stack.enter_context(self._listening(result))
            yield result
        pairs = (
            ("attention", self.wanted.attention, result.attention),
            ("vectors", self.wanted.vectors, result.vectors),
        )
        for kind, wanted, found in pairs:
            if missing := sorted(set(wanted) - found.keys()):
                accepted = "a model with attention by transformers' AttentionInterface (DeBERTa-v2, MPNet: no)"
                raise InputError(self.wanted.field(kind), f"{self.name}, layers {missing} not seen", accepted)

    @contextmanager
    def _listening(self, result: Recording) -> Iterator[None]:
        modules = {
            module: index
            for index in {*self.wanted.attention, *self.wanted.vectors}
            for module in self.layers[index].modules()
        }
        for module, index in modules.items():
            _listeners[module] = _keep_vectors(result, index, self.wanted)
        try:
            with kernels_named(self.configs, _register):
                yield
        finally:
            for module in modules:
                _listeners.pop(module, None)


def attention_configs(model: PreTrainedModel) -> list[Any]:
    """The configs in a model that name an attention kernel."""
    configs = [getattr(module, "config", None) for module in model.modules()]
    return list({id(config): config for config in configs if hasattr(config, "_attn_implementation")}.values())


@contextmanager
def kernels_named(configs: Sequence[Any], name: Callable[[str], str]) -> Iterator[None]:
    """Within the context configs name another attention kernel, made of the name of their own."""
    previous = [config._attn_implementation for config in configs]
    try:
        for config, kernel in zip(configs, previous, strict=True):
            config._attn_implementation = name(kernel or "eager")
        yield
    finally:
        for config, kernel in zip(configs, previous, strict=True):
            config._attn_implementation = kernel


def _keep_output(result: Recording, index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        result.hidden[index] = output[0] if isinstance(output, tuple) else output

    return hook


def _keep_input(result: Recording) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        result.hidden[EMBEDDINGS] = args[0] if args else kwargs["hidden_states"]

    return hook


def _keep_vectors(result: Recording, index: int, wanted: Wanted) -> Callable[..., None]:
    def keep(module: nn.Module, vectors: Vectors, mask: torch.Tensor | None, settings: dict[str, Any]) -> None:
        if index in wanted.attention:
            result.add_attention(index, module, vectors.query, vectors.key, mask, settings)
        if index in wanted.vectors:
            result.vectors.setdefault(index, vectors)

    return keep


def _register(kernel: str) -> str:
    """The name of the recording function around a kernel; registers it when it is not there yet."""
    name = PREFIX + kernel
    if name not in ALL_ATTENTION_FUNCTIONS:

        def attention(
            module: nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            **kwargs: Any,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            with _named(module.config, kernel):
                if (keep := _listeners.get(module)) is not None:
                    keep(module, Vectors(query, key, value), attention_mask, kwargs)
                return _kernel(kernel, module)(module, query, key, value, attention_mask, **kwargs)

        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[kernel])
    return name


def _kernel(name: str, module: nn.Module) -> Callable[..., Any]:
    if name in ALL_ATTENTION_FUNCTIONS:
        return ALL_ATTENTION_FUNCTIONS[name]
    own: Callable[..., Any] = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
    return own


@contextmanager
def _named(config: Any, kernel: str) -> Iterator[None]:
    """A layer's config names the kernel itself: that of flash attention loads what it is named there."""
    ours = config._attn_implementation
    config._attn_implementation = kernel
    try:
        yield
    finally:
        config._attn_implementation = ours


def _beyond_the_mask(module: nn.Module, length: int, settings: dict[str, Any]) -> str | None:
    """What changes attention probabilities and is not in the mask that the kernel was given; None: nothing does."""
    for name in ("softcap", "position_bias", "s_aux"):
        if settings.get(name) is not None:
            return name
    if not is_flash_attention_requested(getattr(module, "config", None)):
        return None
    # The mask of flash attention is of padding alone.
    window, positions = settings.get("sliding_window"), settings.get("position_ids")
    if window is not None and length > window:
        return f"a sliding window of {window} under flash attention"
    if positions is not None and len(positions) == 1 and bool((positions.diff(dim=-1) != 1).any()):
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
    kind = kind_of(model)
    if kind == "next_token":
        return model.get_output_embeddings()
    if not type(model).__name__.endswith("ForMaskedLM"):
        return None
    row = row_of(model.config)
    return model.get_output_embeddings() if row is None else model.get_submodule(row.mlm_head)
