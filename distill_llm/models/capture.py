"""Hidden states, queries, keys and values at chosen layers of any model, during one forward, under any attention kernel."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from distill_llm.architectures.families import any_layers_of, row_of
from distill_llm.architectures.firing import neuron_layer
from distill_llm.common.errors import InputError
from distill_llm.losses.signals import EMBEDDINGS, Vectors, Wanted
from distill_llm.models.attention_kernels import Listener, attention_configs, listening
from distill_llm.models.recording import Recording


class Recorder:
    """Records chosen layers of one model.

    Args:
        model: any transformers model; inside a wrapper such as DDP, give the inner one.
        wanted: which layers.

    Raises:
        InputError: when attention or vectors are wanted of a model that does not take its attention function by name.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted):
        self.layers, self.wanted = any_layers_of(model), wanted
        self.name = type(model).__name__
        self.family, self.configs = row_of(model.config), attention_configs(model)

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
            for index in self.wanted.neurons:
                stack.callback(self._neurons(result, index).remove)
            if self.wanted.attention or self.wanted.vectors:
                stack.enter_context(self._listening(result))
            yield result
        pairs = (
            ("attention", self.wanted.attention, result.attention),
            ("vectors", self.wanted.vectors, result.vectors),
        )
        for kind, wanted, found in pairs:
            if missing := sorted(set(wanted) - found.keys()):
                accepted = "a model that uses transformers' AttentionInterface (DeBERTa-v2 and MPNet do not)"
                raise InputError(self.wanted.field(kind), f"{self.name}, layers {missing} not seen", accepted)

    def _neurons(self, result: Recording, index: int) -> RemovableHandle:
        """Record a layer's FFN neurons."""
        found = self.family and neuron_layer(self.layers[index], self.family)
        if not found:
            raise InputError(
                self.wanted.field("neurons"), f"{self.name}, layer {index}", "layers with an FFN that is known"
            )
        module, parts = found

        def keep(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            result.neurons[index] = output.chunk(parts, dim=-1)[0]

        return module.register_forward_hook(keep)

    def _listening(self, result: Recording) -> AbstractContextManager[None]:
        listeners = {
            module: _keep_vectors(result, index, self.wanted)
            for index in {*self.wanted.attention, *self.wanted.vectors}
            for module in self.layers[index].modules()
        }
        return listening(self.configs, listeners)


def _keep_output(result: Recording, index: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        _keep(result, index, output[0] if isinstance(output, tuple) else output)

    return hook


def _keep_input(result: Recording) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        _keep(result, EMBEDDINGS, args[0] if args else kwargs["hidden_states"])

    return hook


def _keep(result: Recording, index: int, states: torch.Tensor) -> None:
    """Keep hidden states; what is to be differentiated in them must know it before the model goes on."""
    if result.wanted.graph and not states.requires_grad and torch.is_grad_enabled():
        states.requires_grad_(True)
    result.hidden[index] = states


def _keep_vectors(result: Recording, index: int, wanted: Wanted) -> Listener:
    def keep(module: nn.Module, vectors: Vectors, mask: torch.Tensor | None, settings: dict[str, Any]) -> None:
        if index in wanted.attention:
            result.add_attention(index, module, vectors.query, vectors.key, mask, settings)
        if index in wanted.vectors:
            result.vectors.setdefault(index, vectors)

    return keep
