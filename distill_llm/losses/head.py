"""The linear map from hidden states to the logits of a vocabulary, apart from the model that it belongs to."""

from dataclasses import dataclass, replace

import torch


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
