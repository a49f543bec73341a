"""Second moments of activations, which compensation is fitted to."""

from math import ceil
from typing import NamedTuple

import torch

# Share of the mean diagonal of second moments that is added to each entry of it: what calibration tokens are too few to tell
# is left alone. Of 4,096 tokens of text a hundredth of this makes a language model worse than plain removal.
RIDGE = 0.1


class Moments(NamedTuple):
    """Over valid tokens x of C channels: the mean (C,) and the mean of x x^T (C, C), fp32.

    With a loss, each token is weighted by the square of the loss's gradient at x, divided by the mean square of its example.
    To second order that is what an error at x costs. So compensation is most exact where the loss depends on it (in a
    classifier's last layer, at the first token only), and it does not serve a token of massive activations alone, whose errors
    the norm after it hides.
    """

    mean: torch.Tensor
    second: torch.Tensor


class MomentsSum:
    """Sums x and x x^T over tokens, or over a share of them, drawn at random and weighted by its inverse.

    The product is in fp32: with entries rounded to bf16 the least squares failed now and then. To keep it cheap, tokens are
    buffered so that it runs on hundreds of rows at a time, and only the blocks of its upper triangle are computed and held.

    Args:
        channels: C.
        share: of the tokens; None: all tokens until there are half as many as channels, then one in four.
    """

    rows = 256
    blocks = 6

    def __init__(self, channels: int, device: torch.device, share: float | None = None):
        self.sum = torch.zeros(channels, device=device)
        size = -(-channels // self.blocks) or 1  # no channels: a module with nothing left
        self._starts = range(0, channels, size)
        self._upper = [torch.zeros(min(size, channels - i), channels - i, device=device) for i in self._starts]
        self.weight = torch.zeros((), device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)
        self.share = share
        self._buffer: list[torch.Tensor] = []
        self._waiting = 0

    def add(
        self,
        x: torch.Tensor,
        weights: torch.Tensor | None = None,
        keys: torch.Tensor | None = None,
        before: int = 0,
        valid: torch.Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            x: (rows, C).
            weights: (tokens, 1), none below 0; None: all 1.
            keys: (tokens,) uniform random numbers in [0, 1), by which the share is drawn; None: take every token.
            before: how many tokens of all processes came before these.
            valid: (tokens,) the rows of x that are tokens; None: all rows.
        """
        tokens = len(x) if valid is None else len(valid)
        weights = torch.ones(tokens, 1, device=x.device) if weights is None else weights
        take = max(1, self._taken(before + tokens) - self._taken(before))
        if keys is not None and take < tokens:
            chosen, inverse_share = draw(weights.squeeze(1), keys, take)
            weights = weights[chosen] * inverse_share
            valid = chosen if valid is None else valid[chosen]
        x = x.detach() if valid is None else x.detach()[valid]
        self.weight += weights.sum()
        roots = weights.sqrt()
        scaled = x.float() * roots
        self.sum += (roots.T @ scaled).squeeze(0)
        self._buffer.append(scaled)
        self._waiting += len(x)
        if self._waiting >= self.rows:
            self._flush()

    def _taken(self, tokens: int) -> int:
        """How many of the first `tokens` are taken."""
        if self.share is not None:
            return ceil(self.share * tokens)
        every = min(tokens, len(self.sum) // 2)
        return every + ceil((tokens - every) / 4)

    def _flush(self) -> None:
        if not self._buffer:
            return
        x = torch.cat(self._buffer)
        for start, block in zip(self._starts, self._upper, strict=True):
            block.addmm_(x[:, start : start + len(block)].T, x[:, start:])
        self._buffer, self._waiting = [], 0

    def tensors(self) -> list[torch.Tensor]:
        """All sums; of x x^T, blocks of rows from the diagonal to the right."""
        self._flush()
        return [self.weight, self.sum, *self._upper]

    def finish(self) -> Moments:
        """The means over all tokens added. The sums are freed, so nothing can be added afterwards."""
        self._flush()
        total = torch.where(self.weight > 0, self.weight, 1.0).float()
        channels = len(self.sum)
        second = torch.empty(channels, channels)
        for start in reversed(self._starts):
            block = self._upper.pop().div_(total).cpu()
            end = start + len(block)
            second[start:end, end:], second[end:, start:end] = block[:, len(block) :], block[:, len(block) :].T
            square = block[:, : len(block)].triu()  # the product itself is not symmetric to the bit
            second[start:end, start:end] = square + square.triu(1).T
        return Moments(self.sum.div_(total).cpu(), second)


def draw(weights: torch.Tensor, keys: torch.Tensor, take: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw `take` of n tokens. Tokens with a weight above 0 have equal chances; if there are fewer than `take`, all are drawn.

    The result always has `take` tokens, so that nothing waits for the device: tokens of weight 0 fill it up.

    Args:
        weights: (n,), none below 0.
        keys: (n,) uniform random numbers in [0, 1).
        take: from 1 to n.

    Returns:
        indices (take,), and a scalar tensor: tokens with a weight, divided by those of them that were drawn.
    """
    counts = weights > 0
    chosen = torch.where(counts, keys, 2.0).topk(take, largest=False, sorted=False).indices
    found = counts.sum().clamp(min=1)
    return chosen, found / found.clamp(max=take)


def finished(sums: list[MomentsSum], each: int) -> tuple[tuple[Moments, ...], ...]:
    """The moments of a list of sums, `each` of them a row. The list is emptied: each sum is freed before the next is made."""
    sums.reverse()
    found = [sums.pop().finish() for _ in range(len(sums))]
    return tuple(tuple(found[i : i + each]) for i in range(0, len(found), each))
