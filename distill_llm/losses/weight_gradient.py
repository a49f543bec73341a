"""The gradient of an output map's weight, summed over chunks of items."""

import torch

SLICE = 2**23  # numbers of the gradient that are made in low precision before they are summed in fp32


class WeightGradient:
    """The sum over chunks of gradient^T @ inputs.

    In fp32, except where the gradient ends in the products' low precision anyway and has three chunks at most: then the
    running sum is rounded less often than the chunks' products and their sum would be.

    Args:
        weight: (V, H) in the dtype of the products.
        kept: the dtype that the gradient ends in.
        chunks: how many there will be.
    """

    def __init__(self, weight: torch.Tensor, kept: torch.dtype, chunks: int):
        self.direct = chunks <= 1 or weight.dtype == torch.float32 or (kept == weight.dtype and chunks <= 3)
        self.total = torch.empty_like(weight, dtype=weight.dtype if self.direct else torch.float32)
        self.empty = True
        self.rows = max(1, SLICE // weight.shape[1])

    def add(self, gradient: torch.Tensor, inputs: torch.Tensor) -> None:
        """One chunk: (items, V) and (items, H)."""
        if self.direct:
            torch.addmm(self.total, gradient.t(), inputs, beta=0 if self.empty else 1, out=self.total)
        else:
            for begin in range(0, len(self.total), self.rows):
                part = self.total[begin : begin + self.rows]
                product = gradient[:, begin : begin + self.rows].t() @ inputs
                part.copy_(product) if self.empty else part.add_(product)
        self.empty = False

    def result(self) -> torch.Tensor:
        """(V, H); zeros if there was no chunk."""
        return self.total.zero_() if self.empty else self.total
