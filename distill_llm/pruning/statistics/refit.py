"""What the removal of a unit costs once the units that stay take over, as compensation lets them: Optimal Brain Surgeon."""

from dataclasses import replace
from math import ceil

import torch
from transformers import PreTrainedModel

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.architectures.lineage import kinds_of
from distill_llm.common.errors import InputError
from distill_llm.pruning.statistics.moments import RIDGE, Moments
from distill_llm.pruning.statistics.record import Statistics, UnitStatistics
from distill_llm.pruning.units.sizes import linear, weight_of

SHARE = 1 / 64
"""Of so many of a layer's units costs are found at a time; they are counted as removed before the next ones are looked at."""


def refit_costs(model: PreTrainedModel, statistics: Statistics, ridge: float = RIDGE) -> Statistics:
    """The statistics completed with `refit` and `removal`, which the criteria obs and fisher_obs read. It reads no data.

    Each linear that reads heads or neurons is looked at by itself. For C channels it takes about 2 C^3 multiply-adds, in fp64 on
    the device of the weights.

    Args:
        model: the model that the statistics are of; unchanged.
        statistics: with second moments, of all layers or as `LayerMoments`.
        ridge: as in `compensate_linear`.

    Raises:
        InputError: there are no second moments.
    """
    if not statistics.moments:
        raise InputError("statistics", "no second moments", fix="collect them with CalibrationSettings(moments=True)")
    rows = {kind: list(each) for kind, each in statistics.units.items() if isinstance(each, tuple)}
    for i, layer in enumerate(layers_of(model)):
        for (path, letter), moments in zip(family_of(model).readers, statistics.moments[i], strict=True):
            module = linear(layer, path)
            for kind in kinds_of(letter):
                if kind in rows and len(rows[kind][i].magnitude):
                    found = _costs(weight_of(module).detach(), module.bias is not None, moments, rows[kind][i], ridge)
                    rows[kind][i] = found
    units = {**statistics.units, **{kind: tuple(each) for kind, each in rows.items()}}
    return replace(statistics, units=units, has_refit=True).check()


def _costs(weight: torch.Tensor, bias: bool, moments: Moments, units: UnitStatistics, ridge: float) -> UnitStatistics:
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device  # which has no fp64
    w, mean, second = (each.to(device, torch.float64) for each in (weight, moments.mean, moments.second))
    damping = ridge * second.diagonal().mean() + torch.finfo(torch.float32).tiny
    moved = second - torch.outer(mean, mean) if bias else second  # a bias takes over the mean
    moved = moved + damping * torch.eye(len(moved), dtype=moved.dtype, device=device)
    size = w.shape[1] // len(units.magnitude)
    blocks = _blocks(moved, size)
    removal = (_of_units(w, size) * (blocks @ _of_units(w, size))).sum((1, 2))
    refit = removal_costs(w, moved, size, ceil(len(units.magnitude) * SHARE))
    return replace(units, refit=refit.float().cpu(), removal=removal.float().cpu())


def removal_costs(weight: torch.Tensor, second: torch.Tensor, size: int, at_once: int) -> torch.Tensor:
    """(U,) what the squared error of a linear's output gains when a unit is removed and the units that stay are refitted.

    The unit that costs least goes first, and the costs of the others are those without it. So of two units that can take over
    each other's part, one is cheap and the other is dear. Removing unit r adds W_r ([S^-1]_rr)^-1 W_r^T, summed over outputs; W
    and S^-1 are brought up to date after each removal (Hassibi and Stork 1993; for columns of a linear Ling et al. 2024).

    Args:
        weight: (H, C).
        second: S (C, C), positive definite.
        size: channels of a unit; units lie side by side.
        at_once: how many units go before costs are looked at again.
    """
    if not (torch.isfinite(second).all() and torch.isfinite(weight).all()):
        raise InputError("statistics", "second moments that are not finite", "statistics of finite activations")
    factor, failed = torch.linalg.cholesky_ex(second)
    while failed:  # rounding left it indefinite
        second = second + second.diagonal().mean() * 1e-3 * torch.eye(len(second), dtype=second.dtype).to(second)
        factor, failed = torch.linalg.cholesky_ex(second)
    inverse = torch.cholesky_inverse(factor)
    left = torch.arange(weight.shape[1] // size, device=weight.device)
    costs, least = weight.new_zeros(len(left)), weight.new_zeros(())
    while len(left):
        parts = _of_units(weight, size)
        solved = (
            parts / inverse.diagonal()[:, None, None]
            if size == 1
            else torch.linalg.solve(_blocks(inverse, size), parts)
        )
        now = (parts * solved).sum((1, 2))
        order = now.argsort()
        gone, stays = order[:at_once], order[at_once:].sort().values
        costs[left[gone]] = now[gone].clamp(min=least)  # so that scores are in the order of removal
        least = costs[left[gone]].max()
        out, kept = _channels(gone, size), _channels(stays, size)
        moved = torch.linalg.solve(inverse[out][:, out], inverse[out][:, kept])
        weight = weight[:, kept] - weight[:, out] @ moved
        inverse = inverse[kept][:, kept] - inverse[kept][:, out] @ moved
        left = left[stays]
    return costs


def _channels(units: torch.Tensor, size: int) -> torch.Tensor:
    return (units.unsqueeze(1) * size + torch.arange(size, device=units.device)).flatten()


def _of_units(weight: torch.Tensor, size: int) -> torch.Tensor:
    """(H, C) -> (U, size, H)."""
    return weight.T.unflatten(0, (-1, size))


def _blocks(square: torch.Tensor, size: int) -> torch.Tensor:
    """(C, C) -> (U, size, size), the blocks on the diagonal."""
    units = len(square) // size
    return square.reshape(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
