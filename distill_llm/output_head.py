"""The output map of a language model, left out of a forward: its input is handed on, and no logits are made."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from distill_llm.errors import InputError
from distill_llm.losses.head import Head, head_of

PROBE = 60.0  # logits from minus to plus this: beyond any soft cap


@dataclass(frozen=True)
class OutputHead:
    """The linear output map of a model, and what the model does to its logits after it (see `Head`)."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @property
    def head(self) -> Head:
        """With the weights as they are now: of a sharded model, whole inside its forward only."""
        return Head(self.linear.weight, self.linear.bias, self.scale, self.softcap)

    @contextmanager
    def handing_on(self, receive: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Inside the context the map calls `receive` with its input, and gives (0, V) logits.

        It is the map's own forward that is replaced: hooks around it, which gather sharded weights, run as ever.
        """

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            receive(hidden)
            return hidden.new_empty(0, self.linear.out_features)

        with _forward_of(self.linear, forward):
            yield


def output_head(model: PreTrainedModel) -> OutputHead | None:
    """The output map of a causal or masked language model, or None where its logits cannot be made without the model.

    That is so of another kind of model, where the map is no plain linear layer (quantised, or with an adapter of its own),
    and where the model does more to its logits than scale and cap them as its config says, which a forward of one token
    shows.
    """
    name, linear = type(model).__name__, model.get_output_embeddings()
    if not name.endswith(("ForMaskedLM", "ForCausalLM", "GPT2LMHeadModel")) or not isinstance(linear, nn.Linear):
        return None
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return None
    try:
        head = head_of(model, transformed=True)
    except InputError:
        return None
    found = OutputHead(linear, head.scale, head.softcap)
    # Sharded by ZeRO-3, a model has no weights outside of its engine.
    return found if is_deepspeed_zero3_enabled() or _finishes_as_said(model, found) else None


def _finishes_as_said(model: PreTrainedModel, head: OutputHead) -> bool:
    """Whether known products become the logits that the config promises."""
    device = torch.device("cpu") if head.linear.weight.is_meta else head.linear.weight.device
    products = torch.linspace(-PROBE, PROBE, head.linear.out_features, device=device).view(1, 1, -1)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), _forward_of(head.linear, lambda hidden: products):
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits
    expected = products * head.scale
    if head.softcap is not None:
        expected = torch.tanh(expected / head.softcap) * head.softcap
    return logits.shape == expected.shape and torch.allclose(logits.float(), expected, rtol=1e-2, atol=1e-3)


@contextmanager
def _forward_of(linear: nn.Linear, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    linear.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del linear.forward
