"""Cutters of a recipe's pruning section, and calibration data that count how often they are read."""

import torch
from builders.models import random_batch
from builders.recipes import recipe_for

from distill_llm.pipeline.rounds import Cutter
from distill_llm.recipe.recipe import parse_recipe


class Counted:
    """Batches that count how often a model reads them."""

    def __init__(self, model, count=3, **more):
        self.batches = [random_batch(model, seed=seed, **more) for seed in range(count)]
        self.read = 0

    def __iter__(self):
        self.read += 1
        return iter(self.batches)


def cutter(folder, batches, **pruning) -> Cutter:
    return Cutter(parse_recipe(recipe_for(folder, pruning={"keep": 0.5, **pruning})), lambda cut: batches)


def same(a, b) -> bool:
    """Whether two models have the same weights, to the last bits: which way a processor adds up depends on where numbers lie."""
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(_near(x[name], y[name]) for name in x)


def _near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5)
