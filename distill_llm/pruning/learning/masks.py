"""Masks that learn with the model: hard-concrete gates under a budget (l0), or scores that keep the best (movement)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from distill_llm.common.errors import InputError, one_of
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.learning.hard_concrete import open_probability, sampled, settled
from distill_llm.pruning.learning.units import BLOCKS, MaskedUnits
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.planning.competing import choice_for, plan_for_costs
from distill_llm.pruning.planning.rules import PlanningRules
from distill_llm.pruning.units.costs import Costs
from distill_llm.pruning.units.sizes import counts_of

PLAN, SCORES = "plan.json", "scores.safetensors"
"""Files of learnt masks, beside the weights that learnt with them."""
OPEN = 3.0
"""Where log alpha begins: a gate is open with probability 0.99."""


@dataclass(frozen=True)
class MaskBudget:
    """What a training of masks comes down to.

    Attributes:
        keep: share of the layers' cost that stays.
        costs: what units cost.
        rules: what the plan may remove: heads, neurons, or both.
        warm_up: share of the steps in which the target falls from 1 to `keep`.
        blocks: blocks with a mask of their own: "attention" beside heads, "ffn" beside neurons.
    """

    keep: float
    costs: Costs
    rules: PlanningRules
    warm_up: float = 0.5
    blocks: Sequence[str] = ()


class LearnedMasks(nn.Module, ABC):
    """A number for every unit of a model, to be learnt. One subclass a method, in the table `METHODS`.

    Attributes:
        units: what has masks.
        budget: see `MaskBudget`.
        progress: the share of the training's steps that are done; whoever trains sets it.
        plan: of masks that are hardened.
    """

    by: ClassVar[str]
    blocks: ClassVar[bool] = False
    """Whether attention and ffn may have masks of their own."""
    learning_rate: ClassVar[float]
    """The usual one."""

    def __init__(self, model: PreTrainedModel, budget: MaskBudget):
        super().__init__()
        self.units, self.budget = MaskedUnits(model, (*budget.rules.units, *budget.blocks), budget.costs), budget
        self.progress = 0.0
        self.plan: PruningPlan | None = None
        self._scores: Importance | None = None

    @property
    def target(self) -> float:
        """The share of the cost that is to stay now."""
        left = 1 - min(1.0, self.progress / self.budget.warm_up)
        return self.budget.keep + (1 - self.budget.keep) * self._curve(left)

    @staticmethod
    def _curve(left: float) -> float:
        return left

    @abstractmethod
    def values(self) -> torch.Tensor:
        """(U,) what units are multiplied by, with gradients."""

    @abstractmethod
    def settled(self) -> torch.Tensor:
        """(U,) the same without chance or gradients."""

    @abstractmethod
    def worth(self) -> torch.Tensor:
        """(U,) numbers in (0, 1) that rank the units, in fp64."""

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss of an optimizer step; None: nothing."""
        return None

    @abstractmethod
    def record(self) -> dict[str, float]:
        """What the log has of a step."""

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Within, the model's units are masked: in training as they learn, otherwise without chance. Not after `harden`."""
        self._check_soft()
        with self.units.multiplied(model, lambda: self.values() if model.training else self.settled()):
            yield

    def importance(self, model: PreTrainedModel) -> Importance:
        """The score of a unit: its worth times its cost, so that units are ranked by their worth, whatever they cost."""
        scores, counts = self.worth().cpu() * self.units.costs, counts_of(model)  # fp64, as gates all but open need
        rows: dict[str, list[torch.Tensor]] = {kind: [torch.zeros(has[kind]) for has in counts] for kind in BLOCKS}
        for run in self.units.runs:
            rows[run.kind][run.layer] = scores[run.where]
        return Importance(self.by, rows["heads"], rows["neurons"], torch.zeros(len(counts)))

    def harden(self, model: PreTrainedModel) -> PruningPlan:
        """Make a plan of the budget, and fold into the model's weights what the masks are: 0 for units that the plan removes.

        The model then gives what it gives when it is cut by the plan.

        Raises:
            InputError: the budget cannot be met, or the masks are hardened.
        """
        self._check_soft()
        self.progress = 1.0
        self._scores = self.importance(model)
        self.plan = plan_for_costs(model, self._scores, self.budget.keep, self.budget.costs, self.budget.rules)
        self.units.fold(model, self.kept_as(self.settled()) * self.stays())
        return self.plan

    def _check_soft(self) -> None:
        if self.plan is not None:
            fix = "use their `plan`: they are in the weights already; to learn others, make new ones with learned_masks"
            raise InputError("masks", "masks that are hardened", fix=fix)

    def stays(self) -> torch.Tensor:
        """(U,) 1 for the units that the plan keeps, 0 for the others."""
        assert self.plan is not None
        found = torch.zeros(len(self.units), device=next(self.parameters()).device)
        for row in self.plan.layers:
            for run in self.units.runs:
                if run.layer == row.source:
                    found[run.start + torch.tensor(row.units[run.kind], dtype=torch.long)] = 1
        return found

    def told(self) -> dict[str, Any]:
        """What hardened masks came to, as plain JSON: the last `record`, numbers of units, and where plan and masks differ."""
        settled, stays = self.settled() > 0, self.stays() > 0
        counts = {kind: sum(run.count for run in self.units.runs if run.kind == kind) for kind in BLOCKS}
        return {
            "by": self.by,
            "units": {kind: count for kind, count in counts.items() if count},
            "blocks": len(self.units.blocks) if self.blocks else 0,
            **self.record(),
            "kept_closed": int((stays & ~settled).sum()),
            "removed_open": int((settled & ~stays).sum()),
        }

    def kept_as(self, values: torch.Tensor) -> torch.Tensor:
        """(U,) what a unit that stays is multiplied by, of the settled values."""
        return values

    def save(self, folder: Path) -> None:
        """Write the plan of hardened masks, and the scores that it was made by."""
        assert self.plan is not None and self._scores is not None
        self.plan.save(folder / PLAN)
        self._scores.save(folder / SCORES)


class L0(LearnedMasks):
    """Hard-concrete gates (Louizos et al. 2018) held to a budget by Lagrange multipliers (Wang et al. 2020; Xia et al. 2022).

    Attributes:
        units_log_alpha, blocks_log_alpha: of the gates of units, and of those of whole attentions and FFNs.
        multipliers: (2,) lambda 1 and 2.
    """

    by = "l0"
    blocks = True
    learning_rate = 0.1

    def __init__(self, model: PreTrainedModel, budget: MaskBudget):
        super().__init__(model, budget)
        self.units_log_alpha = nn.Parameter(torch.full((len(self.units),), OPEN))
        self.blocks_log_alpha = nn.Parameter(torch.full((len(self.units.blocks),), OPEN))
        self.multipliers = nn.Parameter(torch.zeros(2))

    def values(self) -> torch.Tensor:
        """Samples, the same for all rows of a forward pass."""
        return self.units.with_blocks(sampled(self.units_log_alpha), sampled(self.blocks_log_alpha))

    @torch.no_grad()
    def settled(self) -> torch.Tensor:
        """The gates of a finished training."""
        return self.units.with_blocks(settled(self.units_log_alpha), settled(self.blocks_log_alpha))

    def open(self) -> torch.Tensor:
        """(U,) the probability that a unit is not 0."""
        return self.units.with_blocks(open_probability(self.units_log_alpha), open_probability(self.blocks_log_alpha))

    @torch.no_grad()
    def worth(self) -> torch.Tensor:
        """The probability that a unit is not 0, in fp64: it tells gates apart that are all but open."""
        units, blocks = (open_probability(each.double()) for each in (self.units_log_alpha, self.blocks_log_alpha))
        return self.units.with_blocks(units, blocks)

    def expected_share(self) -> torch.Tensor:
        """The share of the cost that is expected to stay."""
        return self.units.share(self.open())

    def penalty(self) -> torch.Tensor:
        """lambda 1 (s - t) + lambda 2 (s - t)^2 of the expected share s and the target t; the multipliers' gradients are turned
        around, so that a step down the loss is a step up for them."""
        gap = self.expected_share() - self.target
        upward = 2 * self.multipliers.detach() - self.multipliers
        return upward[0] * gap + upward[1] * gap**2

    @torch.no_grad()
    def record(self) -> dict[str, float]:
        """The expected share, the target and the multipliers."""
        first, second = self.multipliers.tolist()
        share = float(self.expected_share())
        return {"share": share, "target": self.target, "lambda_1": first, "lambda_2": second}


class Movement(LearnedMasks):
    """Scores that grow where keeping a unit lowers the loss (Sanh et al. 2020), of whole heads and neurons (Lagunas et al. 2021).

    Over all layers the units with the best scores are kept, as many as the target lets; the others are 0.

    Attributes:
        scores: (U,).
    """

    by = "movement"
    learning_rate = 0.01

    def __init__(self, model: PreTrainedModel, budget: MaskBudget):
        super().__init__(model, budget)
        self.scores = nn.Parameter(torch.zeros(len(self.units)))

    @staticmethod
    def _curve(left: float) -> float:
        return left**3

    def values(self) -> torch.Tensor:
        """0 or 1; the gradient goes to the score as if it were the mask (straight through)."""
        return self.settled() + (self.scores - self.scores.detach())

    @torch.no_grad()
    def settled(self) -> torch.Tensor:
        """1 for the units with the best scores."""
        order = self.scores.argsort(descending=True, stable=True)
        costs = self.units.costs.to(order.device)[order]
        fits = costs.cumsum(0) <= (self.target - self.units.rest) * (1 + 1e-9)
        return torch.zeros_like(self.scores).index_copy(0, order, fits.to(self.scores.dtype))

    @torch.no_grad()
    def worth(self) -> torch.Tensor:
        """The place of a unit among all."""
        order = self.scores.argsort(descending=True, stable=True)
        places = torch.arange(len(order), 0, -1, dtype=torch.float64, device=order.device) / (len(order) + 1)
        return torch.empty_like(places).index_copy(0, order, places)

    def kept_as(self, values: torch.Tensor) -> torch.Tensor:
        """Whole."""
        return torch.ones_like(values)

    @torch.no_grad()
    def record(self) -> dict[str, float]:
        """The share that is kept, the target, and the threshold of the scores."""
        kept = self.settled()
        least = self.scores[kept > 0].min().item() if kept.any() else math.inf
        return {"share": float(self.units.share(kept)), "target": self.target, "threshold": least}


METHODS: dict[str, type[LearnedMasks]] = {each.by: each for each in (L0, Movement)}


def learned_masks(model: PreTrainedModel, by: str, budget: MaskBudget) -> LearnedMasks:
    """Masks for a model, to be learnt.

    Args:
        model: not changed; the masks are on its device.
        by: "l0" or "movement".

    Raises:
        InputError: for another `by`, units that cannot be masked, or a budget that no plan can meet.
    """
    if by not in METHODS:
        raise InputError("masks.by", by, one_of(METHODS, by))
    if others := [unit for unit in budget.rules.units if unit not in BLOCKS]:
        raise InputError("units", others, "heads and neurons: these have masks")
    if not 0 < budget.warm_up <= 1:
        raise InputError("masks.warm_up", budget.warm_up, "a share of the steps, above 0 and at most 1")
    masks = METHODS[by](model, budget)
    choice_for(model, masks.importance(model), budget.keep, budget.costs, budget.rules)  # a whole plan takes long
    return masks.to(model.device)
