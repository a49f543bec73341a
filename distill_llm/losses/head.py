"""The linear map from hidden states to the logits of a vocabulary, apart from the model that it belongs to."""

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.errors import InputError

# Fields of a configuration that say what is done to logits: multiplied by this power of the field, or capped.
LOGIT_FACTORS = {
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_scaling": -1,
    "logits_mup_width_multiplier": -1,
}
LOGIT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# HyperCLOVA X multiplies by what Granite divides by; MPT has the field and does nothing with it.
FACTOR_EXCEPTIONS = {("hyperclovax", "logits_scaling"): 1, ("mpt", "logit_scale"): 0}


@dataclass(frozen=True)
class Head:
    """The linear map from hidden states to logits, and what is done to the logits after it.

    Logits are softcap * tanh(x / softcap) with x = scale * (hidden @ weight^T + bias).

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        scale: Cohere's `logit_scale`, the inverse of Granite's `logits_scaling`.
        softcap: Gemma's `final_logit_softcapping`; None: no cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def products(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """hidden (N, H) @ weight^T + bias into `out` (N, V), all in one dtype."""
        if self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)

    def finish(self, products: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Logits into `out` (N, V), fp32, from `products`: scaled and capped."""
        out.copy_(products)
        if self.scale != 1:
            out.mul_(self.scale)
        return out if self.softcap is None else out.div_(self.softcap).tanh_().mul_(self.softcap)

    def to(self, dtype: torch.dtype) -> "Head":
        """The head with weight and bias in `dtype`."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def first(self, classes: int) -> "Head":
        """The head of the first classes only, without gradient."""
        bias = None if self.bias is None else self.bias[:classes].detach()
        return replace(self, weight=self.weight[:classes].detach(), bias=bias)


def head_of(model: PreTrainedModel, transformed: bool = False) -> Head:
    """The head of a causal or masked language model, for inputs that are the base model's last hidden states.

    Args:
        transformed: the head's inputs will be taken after the layers between base model and output map (BERT's
            `cls.predictions.transform`), so these layers are no fault.

    Raises:
        InputError: the model has no linear map to its vocabulary, or layers before it, or does to its logits what a
            Head cannot say.
    """
    name, linear = type(model).__name__, model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise InputError("model", name, "a causal or masked language model with a linear output map")
    between = [key for key, child in model.named_children() if child is not linear and key != model.base_model_prefix]
    if not transformed and any(True for key in between for _ in model.get_submodule(key).parameters()):
        accepted = "a model whose output map follows its base model at once, or inputs taken after those layers"
        raise InputError("model", f"{name} with {', '.join(between)} around its output map", accepted)
    config = model.config.get_text_config()
    scale, softcap = 1.0, None
    for field, power in LOGIT_FACTORS.items():
        if getattr(config, field, None) is not None:
            scale *= float(getattr(config, field)) ** FACTOR_EXCEPTIONS.get((config.model_type, field), power)
    for field in LOGIT_CAPS:
        if getattr(config, field, None) is not None:
            softcap = float(getattr(config, field))
    return Head(linear.weight, linear.bias, scale, softcap)
