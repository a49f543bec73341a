"""How well a classifier with exits does at a threshold, from one pass over the rows in which all exits answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from distill_llm.architectures.modes import evaluating
from distill_llm.data.padding import Collator
from distill_llm.data.tasks import Task
from distill_llm.evaluation.evaluate import batches_of, by_length, compute_metrics
from distill_llm.metrics.errors import standard_error
from distill_llm.metrics.registry import METRICS, find_metric
from distill_llm.models.inputs import forward_inputs

CANDIDATES = 24
"""Thresholds that one is chosen from."""


@dataclass(frozen=True)
class Score:
    """A score, its standard error (None where it is not known), and how rows went.

    Attributes:
        layers: the mean number of layers that a row went through.
        left: the share of the rows that left at each exit, and, last, of those that went to the end.
    """

    score: float
    standard_error: float | None
    layers: float
    left: tuple[float, ...]


@dataclass(frozen=True)
class ExitAnswers:
    """What all heads of a model say of rows.

    Attributes:
        logits: (R, E + 1, C) of the exits in order, and of the deepest head.
        labels: (R,) the true classes.
        layers: E + 1 numbers of layers.
        task: what the classes are scored by.
    """

    logits: torch.Tensor
    labels: np.ndarray
    layers: tuple[int, ...]
    task: Task

    @property
    def confidences(self) -> torch.Tensor:
        """(R, E) the largest probability at each exit."""
        return self.logits[:, :-1].softmax(-1).amax(-1)

    def places(self, threshold: float | None) -> torch.Tensor:
        """(R,) the head that answers for each row: the first exit above the threshold, else the deepest (E)."""
        last = len(self.layers) - 1
        if threshold is None:
            return torch.full((len(self.logits),), last)
        sure = torch.cat([self.confidences > threshold, torch.ones(len(self.logits), 1, dtype=torch.bool)], 1)
        return sure.long().argmax(1)

    def at(self, threshold: float | None) -> Score:
        """The score of rows that leave at a threshold; None: of the whole model."""
        return self._score(self.places(threshold))

    def of_exit(self, place: int) -> Score:
        """The score of a head alone, counted from the first exit."""
        return self._score(torch.full((len(self.logits),), place))

    def _score(self, places: torch.Tensor) -> Score:
        chosen = self.logits[torch.arange(len(places)), places]
        found = self.task.kind.predictions(chosen, self.labels)
        score, name = compute_metrics(self.task, *found)["score"], self.task.main_metric
        error = standard_error(METRICS[name], score, *found, self.task.num_labels) if name in METRICS else None
        counts = torch.bincount(places, minlength=len(self.layers)).double() / len(places)
        layers = float((counts * torch.tensor(self.layers)).sum())
        return Score(float(score), None if error is None else float(error), layers, tuple(counts.tolist()))

    def candidates(self) -> list[float]:
        """Thresholds that divide the confidences of all exits evenly, rising, none twice."""
        shares = torch.arange(CANDIDATES) / CANDIDATES
        found = torch.quantile(self.confidences.flatten().double(), shares.double())
        return sorted({round(min(value, 1 - 1e-6), 6) for value in found.tolist()})


def exit_answers(
    model: PreTrainedModel, rows: Dataset, task: Task, collator: Collator, batch_size: int = 64
) -> ExitAnswers:
    """What all heads of a model with exits say of encoded rows, in the order of the rows.

    Args:
        model: with exits, on any device.
        rows: of `distill_llm.data.encode`.
        task: of classes.
        collator: makes batches.
        batch_size: rows per forward pass.
    """
    order, logits, labels = by_length(rows), [], []
    with evaluating(model), torch.inference_mode():
        for batch in batches_of(model, rows, order, collator, batch_size, progress=True):
            labels.append(batch.pop("labels").cpu().numpy())
            given: Any = model(**forward_inputs(model, batch), output_exits=True)
            logits.append(torch.cat([given.exit_logits, given.logits[:, None]], 1).float().cpu())
    back = np.argsort(order)
    said: Any = model.config
    layers = (*said.exits["after"], said.num_hidden_layers)
    return ExitAnswers(torch.cat(logits)[torch.from_numpy(back)].clone(), np.concatenate(labels)[back], layers, task)


def chosen_threshold(answers: ExitAnswers, within: float, candidates: Sequence[float] | None = None) -> float | None:
    """The threshold at which rows go through the fewest layers while the score stays near that of the whole model.

    Args:
        answers: to rows that nothing was learnt from.
        within: how many standard errors of the whole model's score the score may be worse.
        candidates: thresholds to choose from; None: `answers.candidates()`.

    Returns:
        None where no candidate's score is near enough, or none saves a layer.
    """
    whole, sign = answers.at(None), 1 if find_metric(answers.task.main_metric).higher_is_better else -1
    least = sign * whole.score - within * (whole.standard_error or 0.0)
    found = [(answers.at(each), each) for each in candidates or answers.candidates()]
    near = [(score.layers, -each) for score, each in found if sign * score.score >= least - 1e-12]
    best = min(near, default=None)
    return None if best is None or best[0] >= whole.layers else -best[1]
