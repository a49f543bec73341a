"""Which weights go, by their scores: exact numbers, in rows, in matrices, over all matrices, or in groups of N:M."""

from collections.abc import Mapping

import torch

from distill_llm.pruning.weights.rules import Scope


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """A mask of the shape of `scores` in which exactly the `count` lowest are True; of equal scores the first ones."""
    found = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    found[scores.flatten().argsort(stable=True)[:count]] = True
    return found.view(scores.shape)


def lowest_of_rows(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The same within each row of (O, I): `count` of each are True."""
    found = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    return found.scatter_(1, scores.argsort(dim=1, stable=True)[:, :count], True)


def lowest_of_groups(scores: torch.Tensor, count: int, size: int) -> torch.Tensor:
    """The same within each group of `size` neighbours in a row of (O, I); I is a multiple of `size`."""
    return lowest_of_rows(scores.reshape(-1, size), count).view(scores.shape)


def removed(scores: Mapping[str, torch.Tensor], share: float, scope: Scope) -> dict[str, torch.Tensor]:
    """Which weights go, by the name of their matrix: (O, I) bool, of scores of the same shape; the lowest go.

    Args:
        share: how many, as a share: rounded in every row with scope row, in every matrix, or over all with scope global.
    """
    if scope == "row":
        return {name: lowest_of_rows(rows, round(share * rows.shape[1])) for name, rows in scores.items()}
    if scope == "matrix":
        return {name: lowest(matrix, round(share * matrix.numel())) for name, matrix in scores.items()}
    flat = torch.cat([matrix.flatten().float().cpu() for matrix in scores.values()])
    chosen = lowest(flat, round(share * len(flat))).split([matrix.numel() for matrix in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, chosen, strict=True)}
