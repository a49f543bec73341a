"""A teacher that is several models: the student learns from the mean of their outputs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, one_of
from distill_llm.losses.signals import Signals
from distill_llm.losses.terms.term import Gives
from distill_llm.teachers.online import OnlineTeacher
from distill_llm.teachers.several import Several

AVERAGES = ("probabilities", "logits")
GIVES = Gives("an ensemble", ("logits", "hidden", "attention", "vectors", "neurons"), mixtures=True)
"""Signals inside of layers are those of the first model. Their gradient would be that of its own outputs, not of the mean."""


class Ensemble(Several):
    """The weighted mean of what several models say. Each reads every batch.

    With weights $w_m$ that sum to 1, `probabilities` gives $\\log \\sum_m w_m p_m$, and `logits` gives $\\sum_m w_m z_m$, whose
    softmax is the normalised geometric mean of the models'. A temperature divides this mean. Classes are matched by
    their names, so models may have them in any order. The mean of models with a single output (a regression) is that
    of their values.

    Args:
        models: as of `Several`.
        weights: a number of at least 0 for each model; they are divided by their sum. A model with 0 is not read, unless
            it is the first and layers are compared. None: equal ones.
        average: what the mean is taken of.
        confidence: whether each output multiplies a model's weight by exp(-H), where H is the entropy of the model's
            distribution: a model that is sure counts for more.

    Attributes:
        weights: their sum is 1.

    Raises:
        InputError: fewer than two models, or weights that do not fit them.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel | OnlineTeacher],
        weights: Sequence[float] | None = None,
        average: Literal["probabilities", "logits"] = "probabilities",
        confidence: bool = False,
    ):
        super().__init__(models)
        weights = [1.0] * len(models) if weights is None else list(weights)
        if len(weights) != len(models) or not all(0 <= weight < math.inf for weight in weights):
            raise InputError("weights", weights, f"{len(models)} numbers of at least 0, one for each model")
        if not any(weights):
            raise InputError("weights", weights, "at least one above 0")
        if average not in AVERAGES:
            raise InputError("average", average, one_of(AVERAGES, str(average)))
        self.weights = tuple(weight / sum(weights) for weight in weights)
        self.average, self.confidence = average, confidence

    @property
    def gives(self) -> Gives:
        """See `GIVES`."""
        return GIVES

    def _agree(
        self, student: PreTrainedModel, tokenizer: Any, first: int, names: Sequence[str] | None = None
    ) -> int | None:
        shared = super()._agree(student, tokenizer, first, names)
        if self.single and self.confidence:
            raise InputError("confidence", True, fix="leave it out: a single output has no entropy (a regression)")
        return shared

    @property
    def adds(self) -> bool:
        """Whether probabilities are added, in logarithms."""
        return self.average == "probabilities" and not self.single

    def _share(self, logits: torch.Tensor, weight: float) -> torch.Tensor:
        """The logarithm of a model's weight in each row, (items, 1) before all weights of the row are made to sum to 1."""
        share = logits.new_full((len(logits), 1), math.log(weight) if weight else -math.inf)
        return share - torch.special.entr(logits.softmax(-1)).sum(-1, keepdim=True) if self.confidence else share

    def signals(
        self,
        batch: Mapping[str, torch.Tensor],
        step: int = 0,
        positions: torch.Tensor | None = None,
        compact: bool = False,
    ) -> Signals:
        """See `Teacher.signals`. Two sets of whole logits in fp32 are held, however many models there are."""
        first: Signals | None = None
        total = norm = torch.tensor(0.0)
        for number in range(len(self.members)):
            if not (self.weights[number] or (self.looks_inside and not number)):
                continue
            if first is not None and positions is not None and not len(positions):
                return first  # no output is asked for
            found = self.outputs(number, batch, step, positions)
            logits = found.logits
            share = self._share(logits, self.weights[number])
            if self.weights[number]:
                part = logits.log_softmax(-1) + share if self.adds else logits * share.exp()
            else:  # read for its layers alone; 0 times a logit of minus infinity would be nan
                part = torch.full_like(logits, -torch.inf if self.adds else 0.0)
            if first is None:
                first, total, norm = found, part, share
            else:
                total = torch.logaddexp(total, part) if self.adds else total + part
                norm = torch.logaddexp(norm, share)
            del found, logits, part
        assert first is not None
        return replace(first, logits=total - norm if self.adds else total / norm.exp())
