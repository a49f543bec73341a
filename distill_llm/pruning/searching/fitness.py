"""What a plan does to a model, cheaply: the divergence on a few thousand tokens, with nothing repaired and nothing trained."""

from collections.abc import Iterable, Mapping
from math import ceil

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.pruning.cutting.strength import row_divergences
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.statistics.settings import DEFAULT_SETTINGS, CalibrationSettings

HELD = 2**30
"""Bytes of the dense model's outputs that are kept at most; of larger ones they are made again for every plan."""


class Divergence:
    """KL(dense || cut), the mean over rows of the mean over a row's outputs; of a regression the squared difference.

    The cut model is made anew for each plan, without compensation: it gives what the masked model gives, and is faster.

    Args:
        model: the dense model.
        batches: as for `collect_statistics`; labels do not count.
        tokens: about how many, padding left out (see `some_tokens`).
        settings: device and precision of the passes.

    Raises:
        InputError: there is no row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Iterable[Mapping[str, torch.Tensor]],
        tokens: int = 4096,
        settings: CalibrationSettings = DEFAULT_SETTINGS,
    ):
        self.model, self.settings, self.batches = model, settings, some_tokens(batches, tokens)
        if not self.batches:
            raise InputError("batches", "no rows", "at least one batch of calibration rows")
        self.dense: list[torch.Tensor] | None = [] if 4 * _outputs(model, self.batches) <= HELD else None

    def __call__(self, plan: PruningPlan) -> float:
        """The divergence of a plan; infinity where the cut model's outputs are not finite."""
        student = prune(self.model, plan)
        rows = row_divergences(self.model, student, self.batches, self.settings, self.dense)
        return float(rows.mean()) if bool(rows.isfinite().all()) else float("inf")


def _outputs(model: PreTrainedModel, batches: list[Mapping[str, torch.Tensor]]) -> int:
    """How many numbers the model makes of the batches where its outputs are as wide as a vocabulary; else they are few: 0."""
    if model.get_output_embeddings() is None:
        return 0
    return sum(batch["attention_mask"].numel() for batch in batches) * model.config.get_text_config().vocab_size


def some_tokens(batches: Iterable[Mapping[str, torch.Tensor]], tokens: int) -> list[Mapping[str, torch.Tensor]]:
    """About so many tokens of the batches, padding left out: whole rows, from batches that are evenly spread over all.

    Calibration batches come in the order of their rows' lengths, so that the first ones alone would be the shortest rows.
    """
    every = list(batches)
    total = sum(int(batch["attention_mask"].sum()) for batch in every)
    if total <= tokens:
        return every
    count = max(1, ceil(tokens / total * len(every)))
    found: list[Mapping[str, torch.Tensor]] = []
    for batch in (every[i * len(every) // count] for i in range(count)):
        sizes = batch["attention_mask"].flatten(1).sum(1).cumsum(0)
        rows = max(1, int((sizes <= tokens / count).sum()))
        found.append({name: value[:rows] for name, value in batch.items()})
    return found
