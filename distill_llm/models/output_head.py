"""The output map of a language model, skipped in a forward: its input is handed on, and no logits are computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils.generic import is_flash_attention_requested

from distill_llm.architectures.families import facts_of
from distill_llm.architectures.modes import forward_as, named_outputs
from distill_llm.common.errors import InputError
from distill_llm.losses.head import Head
from distill_llm.losses.items import is_language_model
from distill_llm.models.attention_kernels import attention_configs, kernels_named

PROBE = 60.0  # logits from minus to plus this: beyond any soft cap
# Fields of a configuration that say what is done to logits: multiplied by this power of the field, or capped.
LOGIT_FACTORS = {
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_scaling": -1,
    "logits_mup_width_multiplier": -1,
}
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class OutputHead:
    """The linear output map of a model, and what the model does to its logits after it (see `Head`)."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    @property
    def head(self) -> Head:
        """The head with the weights as they are now. Those of a sharded model are whole only inside its forward."""
        return Head(self.linear.weight, self.linear.bias, self.scale, self.softcap)

    @contextmanager
    def handing_on(self, receive: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Inside the context the map calls `receive` with its input, and gives (0, V) logits.

        Only the map's own forward is replaced: hooks around it, which gather sharded weights, still run.
        """

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            receive(hidden)
            return hidden.new_empty(0, self.linear.out_features)

        with forward_as(self.linear, forward):
            yield


def output_head(model: PreTrainedModel) -> OutputHead | None:
    """The output map of a causal or masked language model; None where its logits cannot be computed outside the model.

    None under ZeRO-3 too: it lets a weight go after its module's forward, and brings it back for the gradient of the module's
    outputs alone.

    None for other kinds of models, for a map that is no plain linear layer (quantised, or with an adapter), and for a model
    that does more to its logits than scale and cap them as its config says. A forward of one token shows that.
    """
    linear = model.get_output_embeddings()
    if not is_language_model(model) or not isinstance(linear, nn.Linear) or is_deepspeed_zero3_enabled():
        return None
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return None
    try:
        head = head_of(model, transformed=True)
    except InputError:
        return None
    found = OutputHead(linear, head.scale, head.softcap)
    return found if _finishes_as_said(model, found) else None


def head_of(model: PreTrainedModel, transformed: bool = False) -> Head:
    """The head of a causal or masked language model, for inputs that are the base model's last hidden states.

    Args:
        transformed: the head's inputs will be taken after the layers between base model and output map (BERT's
            `cls.predictions.transform`), so these layers are no fault.

    Raises:
        InputError: the model has no linear map to its vocabulary, or has layers between base model and map.
    """
    name, linear = type(model).__name__, model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise InputError("model", name, "a causal or masked language model with a linear output map")
    between = [key for key, child in model.named_children() if child is not linear and key != model.base_model_prefix]
    if not transformed and any(True for key in between for _ in model.get_submodule(key).parameters()):
        accepted = "a model whose output map directly follows its base model, or inputs taken after those layers"
        raise InputError("model", f"{name} with {', '.join(between)} around its output map", accepted)
    config = model.config.get_text_config()
    scale, softcap = 1.0, None
    powers = {**LOGIT_FACTORS, **facts_of(config).logit_powers}
    for field in LOGIT_FACTORS:
        if getattr(config, field, None) is not None:
            scale *= float(getattr(config, field)) ** powers[field]
    for field in LOGIT_CAPS:
        if getattr(config, field, None) is not None:
            softcap = float(getattr(config, field))
    return Head(linear.weight, linear.bias, scale, softcap)


def _finishes_as_said(model: PreTrainedModel, head: OutputHead) -> bool:
    """Whether known products become the logits that the config promises."""
    device = torch.device("cpu") if head.linear.weight.is_meta else head.linear.weight.device
    products = torch.linspace(-PROBE, PROBE, head.linear.out_features, device=device).view(1, 1, -1)
    devices = [model.device] if model.device.type == "cuda" else []
    # Flash attention runs neither on a CPU, where a model may still be, nor in fp32, in which mixed precision keeps its weights.
    # A few families (Falcon, GPT-J, GPT-Neo) keep the kernel that they were made with, so eager alone is not enough.
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=is_flash_attention_requested(model.config))
    eager = kernels_named(attention_configs(model), lambda kernel: "eager")
    fixed = forward_as(head.linear, lambda hidden: products)
    with torch.no_grad(), half, eager, fixed, named_outputs(model), torch.random.fork_rng(devices):
        logits = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device)).logits
    expected = products * head.scale
    if head.softcap is not None:
        expected = torch.tanh(expected / head.softcap) * head.softcap
    return logits.shape == expected.shape and torch.allclose(logits.float(), expected, rtol=1e-2, atol=1e-3)
