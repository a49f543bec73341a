"""Distances between attention probabilities, from queries and keys: attention itself stays on its fast kernel."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from distill_llm.losses.distances import MAP_DISTANCES

BLOCK = {"cpu": 2**20}
OTHER_BLOCK = 2**25
"""Attention probabilities made at a time: few enough for a processor's cache, many enough to keep another device busy."""


class AttentionInputs(NamedTuple):
    """What one attention layer computed its probabilities from: softmax(scaling * query @ key^T + bias).

    query, key: (B, N, T, D). bias: None or additive fp32 broadcastable to (B, N, T, T), very negative at hidden keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None

    def scores(self) -> torch.Tensor:
        """(B, N, T, T) in fp32; the product runs in the dtype of the queries."""
        scores = (self.query @ self.key.transpose(-1, -2)).float().mul_(self.scaling)
        return scores if self.bias is None else scores.add_(self.bias)

    def part(self, examples: slice, heads: slice) -> "AttentionInputs":
        """The same for some examples and heads, as views."""
        bias = self.bias
        if bias is not None:
            bias = bias[examples if len(bias) > 1 else slice(None), heads if bias.shape[1] > 1 else slice(None)]
        return AttentionInputs(self.query[examples, heads], self.key[examples, heads], self.scaling, bias)

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Examples and heads whose probabilities are made together."""
        examples, heads, queries, _ = self.query.shape
        most = max(1, BLOCK.get(self.query.device.type, OTHER_BLOCK) // max(1, queries * self.key.shape[2]))
        rows, columns = max(1, most // heads), min(heads, most)
        for row in range(0, examples, rows):
            for column in range(0, heads, columns):
                yield slice(row, row + rows), slice(column, column + columns)

    def select(self, heads: torch.Tensor) -> "AttentionInputs":
        """The same for a choice of heads, in the given order, with tokens outside of heads in memory as models do."""
        query, key = (each.transpose(1, 2).index_select(2, heads).transpose(1, 2) for each in (self.query, self.key))
        bias = self.bias if self.bias is None or self.bias.shape[1] == 1 else self.bias.index_select(1, heads)
        return AttentionInputs(query, key, self.scaling, bias)


def attention_distance(
    student: AttentionInputs, teacher: AttentionInputs, valid: torch.Tensor, distance: str = "kl"
) -> torch.Tensor:
    """Sum over valid query tokens of the mean over heads of the distance between attention rows.

    Head j is compared with head j; where the numbers of heads differ, the maps are averaged over heads first.

    Args:
        student: inputs of one student layer.
        teacher: inputs of the mapped teacher layer, no gradient.
        valid: (B, T), 1 at valid tokens and 0 at padding.
        distance: a name of `distill_llm.losses.distances.MAP_DISTANCES`.

    Returns:
        scalar in fp32.
    """
    weight = valid.float()[:, None, :]
    if student.query.shape[1] != teacher.query.shape[1]:
        log_q, log_p = _mean_over_heads(student), _mean_over_heads(teacher)
    elif distance == "kl":  # the most used one has a gradient by hand, which keeps nothing of size T x T
        total: torch.Tensor = _AttentionKL.apply(student.query, student.key, student, teacher, weight)
        return total / student.query.shape[1]
    else:
        log_q, log_p = student.scores().log_softmax(-1), teacher.scores().log_softmax(-1)
    return (MAP_DISTANCES[distance](log_q, log_p).mean(1, keepdim=True) * weight).sum()


def _mean_over_heads(inputs: AttentionInputs) -> torch.Tensor:
    log_probabilities = inputs.scores().log_softmax(-1)
    return log_probabilities.logsumexp(1, keepdim=True) - math.log(log_probabilities.shape[1])


def _softmax(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., K) -> the softmax over K, and the logarithm of its normaliser (...).

    torch's own takes one number at a time in rows shorter than a vector register (16 of fp32): five times as long as this.
    """
    top = scores.amax(-1, keepdim=True)
    if scores.shape[-1] >= 16:
        probabilities = scores.softmax(-1)
        return probabilities, top.squeeze(-1) - probabilities.amax(-1).log()
    probabilities = (scores - top).exp_()
    total = probabilities.sum(-1, keepdim=True)
    return probabilities.div_(total), (top + total.log()).squeeze(-1)


class _AttentionKL(torch.autograd.Function):
    """Weighted sum of KL(teacher || student) over all rows and heads.

    Its gradient by the student's scores is (student probabilities - teacher probabilities), so the gradients by queries
    and keys are made while the probabilities are at hand, a block of them at a time, and nothing of size T x T is kept for
    the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        student: AttentionInputs,
        teacher: AttentionInputs,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        total = torch.zeros((), device=query.device)
        with_slope = any(ctx.needs_input_grad[:2])
        # Near convergence the slopes are too small for fp16, which a loss scale applied later cannot mend.
        dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
        by_query, by_key = (torch.empty_like(each, dtype=dtype) if with_slope else None for each in (query, key))
        for block in student.blocks():
            own, source, weights = student.part(*block), teacher.part(*block), weight[block[0]]
            target_scores, scores = source.scores(), own.scores()
            (p, log_z_target), (q, log_z) = _softmax(target_scores), _softmax(scores)
            # KL = sum of p (s - s') - log Z + log Z'
            rows = torch.linalg.vecdot(p, target_scores.sub_(scores)).add_(log_z.sub_(log_z_target))
            total += (rows * weights).sum()
            if by_query is not None and by_key is not None:
                slope = q.sub_(p).mul_(weights.unsqueeze(-1) * student.scaling).to(dtype)
                by_query[block] = slope @ own.key.to(dtype)
                by_key[block] = slope.transpose(-1, -2) @ own.query.to(dtype)
        if with_slope:
            ctx.save_for_backward(by_query, by_key)
            ctx.dtype = query.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        by_query, by_key = ctx.saved_tensors
        gradient = gradient.to(by_query.dtype)
        return (by_query * gradient).to(ctx.dtype), (by_key * gradient).to(ctx.dtype), None, None, None
