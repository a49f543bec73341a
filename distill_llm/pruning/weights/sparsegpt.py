"""SparseGPT's update: the weights that stay make up for those that go (Frantar and Alistarh 2023, section 3)."""

from collections.abc import Callable

import torch

from distill_llm.pruning.weights.choosing import lowest, lowest_of_groups

Choose = Callable[[torch.Tensor, int], torch.Tensor]
"""Of the costs (O, C) of the columns that begin with this one: which weights go, (O, C) bool."""


def sparsegpt(
    weight: torch.Tensor,
    second: torch.Tensor,
    choose: Choose,
    *,
    block: int = 128,
    every: int | None = None,
    damping: float = 0.01,
    gone: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A sparse matrix whose outputs are near to those of `weight`.

    Columns are taken in order. What the removal of w_j costs in the outputs is w_j^2 / [H^-1]_jj with H the second moment of the
    inputs, damped; the weights of later columns take over -w_j [H^-1]_j,j+1.. / [H^-1]_jj (Optimal Brain Surgeon's update
    in which the columns before are fixed). The rows of the Cholesky factor of H^-1 hold all of these inverses.

    Args:
        weight: (O, I).
        second: (I, I), mean of x x^T over tokens; finite.
        choose: which weights go, by their costs.
        block: columns after which what they lost is passed on to all later ones at once.
        every: columns that `choose` is asked for at a time; a divisor of `block`; None: a block.
        damping: what is added to the diagonal, as a share of its mean over features that are not always zero.
        gone: (O, I) bool, weights that go whatever they cost.

    Returns:
        The new weight, zero where weights went, in the dtype of the old; and which weights went, (O, I) bool.
    """
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device  # which has no fp64
    w = (
        weight.detach().to(device, torch.float64).T.clone(memory_format=torch.contiguous_format)
    )  # (I, O): a column is a row
    factor, dead = _inverse_factor(second.to(device, torch.float64), damping)
    w[dead] = 0.0
    removed = torch.zeros(w.shape, dtype=torch.bool, device=device)
    for begin in range(0, len(w), block):
        columns = slice(begin, min(begin + block, len(w)))
        part, inverse, gone_here = w[columns], factor[columns, columns], removed[columns]
        errors = torch.zeros_like(part)
        for j in range(len(part)):
            if j % (every or block) == 0:
                chosen = slice(j, j + (every or block))
                costs = (part[chosen].T / inverse.diagonal()[chosen]).square()
                if gone is not None:
                    costs.masked_fill_(gone[:, columns][:, chosen].to(device), -1.0)
                gone_here[chosen] = choose(costs, begin + j).T
            errors[j] = part[j].masked_fill(~gone_here[j], 0.0) / inverse[j, j]
            part[j:].addr_(inverse[j, j:], errors[j], alpha=-1)
        part.masked_fill_(gone_here, 0.0)  # what rounding left
        w[columns.stop :].addmm_(factor[columns, columns.stop :].T, errors, alpha=-1)
    return w.T.to(weight), removed.T.to(weight.device)


def _inverse_factor(second: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The upper Cholesky factor of the inverse of the damped second moment, and the features that were always zero."""
    dead = second.diagonal() == 0
    mean = second.diagonal()[~dead].mean() if not dead.all() else second.new_ones(())
    second = second + torch.diag(dead.to(second) * mean)  # of the size of the others: it counts in no repair
    share = damping * mean
    while True:
        damped = second + share * torch.eye(len(second), dtype=second.dtype, device=second.device)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper, dead
        share = 10 * share


def choose_share(share: float, shape: torch.Size) -> Choose:
    """Weights by the share of a matrix: of the whole exactly the rounded number goes, and from each block as even a part."""
    rows = shape[0]

    def choose(costs: torch.Tensor, begin: int) -> torch.Tensor:
        count = round(share * rows * (begin + costs.shape[1])) - round(share * rows * begin)
        return lowest(costs, count)

    return choose


def choose_groups(count: int, size: int) -> Choose:
    """`count` of every `size` neighbours go."""
    return lambda costs, begin: lowest_of_groups(costs, count, size)
