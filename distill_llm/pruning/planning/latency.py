"""Plans that keep a share of the whole model's measured latency.

What is measured is one forward pass over a batch of full-length sequences; of decoders, reading the prompt (prefill).
Generating token by token is bound by reading weights and the cache of keys and values, and gains differently from a removed
head or neuron: `cost="memory"` is the nearer measure for that.
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from distill_llm.common.errors import InputError
from distill_llm.measuring.clocks import Measure, relative_latency
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.plan import PruningPlan, full_plan
from distill_llm.pruning.planning.competing import plan_for_costs
from distill_llm.pruning.planning.latency_costs import costs_for, latency_costs
from distill_llm.pruning.planning.rules import DEFAULT_RULES, PlanningRules
from distill_llm.pruning.units.costs import Costs


@dataclass(frozen=True)
class LatencySettings:
    """How a share of latency is measured, and when a plan is near enough.

    Attributes:
        batch_size, sequence_length: of the batch (B, T) that is timed.
        dense: the model whose latency `keep` is a share of; None: the model that is pruned.
        costs: what units of `dense` take, from `latency_costs`; None: measure them.
        measure: measures pruned models against `dense`, in place of `relative_latency`.
        tolerance: how far from `keep` a plan may be, as a share of it.
        attempts: how many pruned models are measured at most.
    """

    batch_size: int = 32
    sequence_length: int = 64
    dense: PreTrainedModel | None = None
    costs: Costs | None = None
    measure: Measure | None = None
    tolerance: float = 0.03
    attempts: int = 10

    def relative(self, model: PreTrainedModel, dense: PreTrainedModel) -> float:
        """How many times as long `model` takes as `dense`."""
        if self.measure is not None:
            return self.measure(model, dense)
        return relative_latency(model, dense, self.batch_size, self.sequence_length)


DEFAULT_LATENCY = LatencySettings()


def plan_for_latency(
    model: PreTrainedModel,
    scores: Importance,
    keep: float,
    settings: LatencySettings = DEFAULT_LATENCY,
    rules: PlanningRules = DEFAULT_RULES,
) -> PruningPlan:
    """Choose what stays so that `keep` of the whole model's measured latency remains, within the tolerance.

    It plans with the costs of single layers, prunes, times the pruned model in turn with the dense one, and corrects the budget
    of the layers (along the line through the nearest measurements above and below) until the measured share is `keep`.

    Args:
        model: what is pruned.
        scores: from `score(...)`, for this very model.
        keep: share of the latency of the whole model, with its embeddings and head, in (0, 1].
        settings: what is timed, and against what.
        rules: what may be removed.

    Returns:
        The plan. `kept` is the measured share; `note` says why it is not `keep`, where it is not.

    Raises:
        InputError: as `plan_pruning`, or these units cannot reach `keep`.
    """
    if not 0 < keep <= 1:
        raise InputError("keep", keep, "a share above 0 and at most 1")
    dense = model if settings.dense is None else settings.dense
    costs = settings.costs or latency_costs(dense, settings.batch_size, settings.sequence_length)
    costs = costs_for(model, costs)
    search = _Search(keep, settings, 1.0 if dense is model else settings.relative(model, dense), full_plan(model))
    while search.end is None:
        try:
            plan = plan_for_costs(model, scores, search.share, costs, rules)
        except InputError as error:
            if error.field != "keep":
                raise
            search.out_of_reach()
            continue
        if search.is_known(plan):
            search.raise_share()
        else:
            search.add(plan, settings.relative(prune(model, plan), dense))
    return search.result()


@dataclass(frozen=True)
class _Tried:
    """A plan, the share of the layers' latency that it keeps by its costs, and the share of the whole that was measured."""

    plan: PruningPlan
    share: float
    latency: float


class _Search:
    """A search for the share of the layers' costs with which the measured share of the latency is `keep`.

    The share is between `low`, which keeps too little or cannot be planned, and that of `above`, the smallest share that kept
    too much. `below` is the largest measured share that kept too little.
    """

    def __init__(self, keep: float, settings: LatencySettings, latency: float, whole: PruningPlan):
        self.keep, self.settings = keep, settings
        self.first = self.above = _Tried(whole, 1.0, latency)
        self.below: _Tried | None = None
        self.tried = [self.first]
        self.share, self.low, self.reachable = keep, 0.0, True

    @property
    def met(self) -> bool:
        """Whether a plan is within the tolerance."""
        return any(abs(each.latency - self.keep) <= self.settings.tolerance * self.keep for each in self.tried)

    @property
    def end(self) -> str | None:
        """Why the search is over; None while it goes on."""
        if self.first.latency <= self.keep:
            return "the model is faster already"
        if self.met:
            return "met"
        if len(self.tried) > self.settings.attempts:
            return f"not met in {self.settings.attempts} measurements"
        if self.above.share - self.low < 1e-3 * self.above.share:
            return "these units come in larger steps"
        return None

    def out_of_reach(self) -> None:
        """No plan keeps as little as this share."""
        self.reachable = False
        self.raise_share()

    def raise_share(self) -> None:
        """Look between this share and the one above."""
        self.low, self.share = self.share, (self.share + self.above.share) / 2

    def is_known(self, plan: PruningPlan) -> bool:
        """Whether this plan was the last to keep too little."""
        below = None if self.below is None else self.below.plan
        return below is not None and (plan.layers, plan.whole) == (below.layers, below.whole)

    def add(self, plan: PruningPlan, latency: float) -> None:
        """A plan was measured: go on from it."""
        latest = _Tried(plan, plan.kept or self.share, latency)
        self.tried.append(latest)
        if latency > self.keep:
            self.above = latest
        else:
            self.below, self.low = latest, latest.share
        self.share = self._next()

    def _next(self) -> float:
        """Where the line through two measurements meets `keep`, well inside the shares that are left."""
        other = self.below or (self.first if self.above is not self.first else None)
        slope = (self.above.latency - other.latency) / (self.above.share - other.share) if other else 0.0
        if slope <= 0:  # no second measurement, or only the scatter of the clock
            return (self.low + self.above.share) / 2
        inside = 0.1 * (self.above.share - self.low)
        meets = self.above.share - (self.above.latency - self.keep) / slope
        return min(max(meets, self.low + inside), self.above.share - inside)

    def result(self) -> PruningPlan:
        """The nearest plan, with its measured share and a note if that is not within the tolerance."""
        best = min(self.tried, key=lambda each: abs(each.latency - self.keep))
        if self.met:
            return replace(best.plan, kept=best.latency, note=None)
        if self.below is None and not self.reachable:
            accepted = f"at least {best.latency:.4f} of the latency: removing these units cannot go lower"
            raise InputError("keep", self.keep, accepted)
        note = f"kept {best.latency:.4f} of the latency instead of {self.keep}: {self.end}"
        return replace(best.plan, kept=best.latency, note=note)
