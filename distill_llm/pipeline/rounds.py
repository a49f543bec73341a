"""The removal of a round: a plan and a cut, once or several times over."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from distill_llm.losses.items import kind_of
from distill_llm.measuring.clocks import relative_latency
from distill_llm.models.masks import Masks
from distill_llm.pipeline.calibration import Calibration
from distill_llm.pipeline.searching import search_plan
from distill_llm.pruning.compensation.bypass import Bypasses
from distill_llm.pruning.cutting.strength import Strength
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.cutting.zeros import masks_after
from distill_llm.pruning.importance import score
from distill_llm.pruning.learning.scales import Scaled, has_units, scale_units
from distill_llm.pruning.plan import PruningPlan, full_plan, keep_layers
from distill_llm.pruning.planning.budgets import share_of
from distill_llm.pruning.planning.competing import plan_for_costs
from distill_llm.pruning.planning.latency import LatencySettings, plan_for_latency
from distill_llm.pruning.planning.latency_costs import costs_for, latency_costs
from distill_llm.pruning.planning.small_cuts import compose_plans, cut_shares
from distill_llm.pruning.searching.evolution import Searched
from distill_llm.pruning.statistics.calibration_pass import Batches
from distill_llm.pruning.statistics.moments import RIDGE
from distill_llm.pruning.statistics.processes import from_main_process, process
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.units.costs import unit_costs
from distill_llm.pruning.weights.sparsify import sparsify
from distill_llm.recipe.recipe import Recipe, budget_batch


@dataclass(frozen=True)
class Cut:
    """The result of a removal.

    Attributes:
        plan: for the model that was cut.
        model: the pruned model, after compensation where the section asks for it.
        kept: the share of the teacher's cost that is left.
        compensated: whether anything took over what was removed.
        strengths: of each small cut whose compensation was chosen on held-out rows, how strong it is.
        masks: of the single weights that are zero in the model; None where none were removed.
        searches: of each small cut whose plan was searched, what was found.
        scaled: what scales of units did after the last cut; None where none were learnt.
    """

    plan: PruningPlan
    model: PreTrainedModel
    kept: float
    compensated: bool
    strengths: tuple[Strength, ...] = ()
    masks: Masks | None = None
    searches: tuple[Searched, ...] = ()
    scaled: Scaled | None = None


class Cutter:
    """Cuts models as a recipe's pruning section says. All processes of a run call it together.

    Args:
        recipe: a checked recipe with a pruning section.
        batches: opens the calibration data of a cut; cuts are counted from 0 in every round. The data are the same on every
            process and each time.
        device: where to compute a layer at a time with models that are elsewhere; None: where the models are.
        folder: where a search keeps what it tried; None: nowhere.
    """

    def __init__(
        self,
        recipe: Recipe,
        batches: Callable[[int], Batches],
        device: torch.device | None = None,
        folder: Path | None = None,
    ):
        assert recipe.pruning is not None
        self.recipe, self.section, self.rules = recipe, recipe.pruning, recipe.pruning.rules
        self.calibration = Calibration(recipe.pruning, recipe.seed, batches, device)
        self.is_main, self.folder = process()[0] == 0, folder

    def cut(self, student: PreTrainedModel, teacher: PreTrainedModel, keep: float, file: Path | None = None) -> Cut:
        """Remove until `keep` of the teacher's cost is left.

        Args:
            student: unchanged, in eval mode.
            teacher: what `keep` is a share of.
            keep: share of the cost of the teacher's layers; of its latency with cost latency.
            file: where the statistics of the student are kept: read if they are there, else written.
        """
        if self.section.weights is not None and keep == 1:  # single weights alone go
            whole = full_plan(student)
            return Cut(whole, prune(student, whole), 1.0, False)  # with the lineage that losses of layers follow
        self.calibration.check_in_order(student)
        plan: PruningPlan | None = None
        searches: list[Searched] = []
        model, compensated, strengths = student, False, []
        for number, share in enumerate(cut_shares(self.share(student, teacher), keep, self.section.cuts)):
            statistics = self.calibration.statistics(model, number, None if number else file)
            chosen = from_main_process(self.plan(model, teacher, statistics, share) if self.is_main else None)
            if self.section.search is not None:
                found = from_main_process(
                    self.searched(model, teacher, statistics, chosen, number) if self.is_main else None
                )
                chosen, searches = found.plan, [*searches, found]
            plan = chosen if plan is None else compose_plans(student, plan, chosen)
            bypasses = self.calibration.bypasses(model, chosen, number)
            folded = self.calibration.with_moments(statistics, model, number) if self.section.folds else None
            model, strength = self._compensated(model, chosen, folded, bypasses, number)
            compensated |= self._takes_over(folded, bypasses, strength)
            strengths += [strength] if strength else []
        assert plan is not None and plan.kept is not None
        scaled = self._scaled(model, student)
        compensated |= scaled is not None and scaled.folded
        if self.section.cost == "latency":
            return Cut(plan, model, plan.kept, compensated, tuple(strengths), None, tuple(searches), scaled)
        kept, note = self.share(model, teacher), None
        if abs(kept - keep) > 0.01 * keep:
            note = f"kept {kept:.2%} of the layers' {self.section.cost} instead of {keep:.2%}: "
            note += "these units come in larger steps"
        own = share_of(model, student, self.section.cost, *self.batch(student))
        return Cut(
            replace(plan, kept=own, note=note),
            model,
            kept,
            compensated,
            tuple(strengths),
            None,
            tuple(searches),
            scaled,
        )

    def cut_by(
        self, student: PreTrainedModel, teacher: PreTrainedModel, plan: PruningPlan, masks: Masks | None = None
    ) -> Cut:
        """Cut by a plan that was learnt: its masks are in the student's weights, and nothing is compensated.

        Args:
            masks: of a sparse student, whose zeros stay.
        """
        model = prune(student, plan)
        zeros = None if masks is None else masks_after(student, masks, plan)
        return Cut(plan, model, self.share(model, teacher), False, masks=zeros)

    def cut_layers(self, student: PreTrainedModel) -> Cut:
        """Keep the layers that the section names."""
        assert self.section.layers is not None
        self.calibration.check_in_order(student)
        plan = keep_layers(student, self.section.layers)
        bypasses = self.calibration.bypasses(student, plan)
        kept = plan.share(student, self.section.cost, *self.batch(student))
        model, strength = self._compensated(student, plan, None, bypasses)
        scaled = self._scaled(model, student)
        compensated = self._takes_over(None, bypasses, strength) or (scaled is not None and scaled.folded)
        return Cut(plan, model, kept, compensated, (strength,) if strength else (), scaled=scaled)

    def searched(
        self, model: PreTrainedModel, teacher: PreTrainedModel, statistics: Statistics, plain: PruningPlan, number: int
    ) -> Searched:
        """A better plan than the plain one of a cut, at the same cost."""
        section, calibration = self.section, self.calibration
        scores = score(statistics, section.criterion, self.recipe.seed, section.layer_criterion)
        if section.cost == "latency":
            costs = costs_for(model, latency_costs(teacher, *self.batch(teacher)))
        else:
            costs = unit_costs(model, section.cost, *self.batch(model))
        file = None if self.folder is None else self.folder / f"search-{number + 1}.json"
        batches = calibration.batches(number)
        found = search_plan(self.recipe, model, scores, plain, costs, batches, calibration.settings, file)
        if section.cost != "latency" or found.plan is plain:
            return found
        kept = relative_latency(prune(model, found.plan), teacher, *self.batch(teacher))
        note, wanted = None, plain.kept or 1.0
        if kept > (1 + LatencySettings.tolerance) * wanted:  # the table of single layers' times said that it would not
            note = f"kept {kept:.4f} of the latency, where the plan before the search kept {wanted:.4f}"
        return replace(found, plan=replace(found.plan, kept=kept, note=note))

    def without_weights(self, cut: Cut, number: int = 1) -> Cut:
        """Remove single weights of a cut model, where the section asks for it: as many as are due after round `number`."""
        section, weights = self.section, self.section.weights
        if weights is None:
            return cut
        rules, calibration = weights.rules, self.calibration
        kept = kept_after(1 - rules.share, number, section.rounds, section.schedule)
        model, masks = sparsify(
            cut.model,
            calibration.batches(0) if rules.needs != "nothing" else [],
            rules,
            loss=calibration.loss if rules.needs == "gradients" else "labels",
            layers_at_once=weights.layers_at_once,
            progress=(1 - kept) / rules.share,
            settings=calibration.settings,
        )
        return replace(cut, model=model, masks=masks, compensated=cut.compensated or rules.criterion == "sparsegpt")

    def _scaled(self, student: PreTrainedModel, model: PreTrainedModel) -> Scaled | None:
        """Factors for the units of what a round's cuts left of a model, in place, where the section asks for them."""
        section, calibration = self.section.scales, self.calibration
        if section is None or not has_units(student):
            return None
        batches, held_out = calibration.batches(0), calibration.batches(0, held_out=True)
        return scale_units(student, model, batches, held_out, section.scaling, settings=calibration.settings)

    def _compensated(
        self,
        model: PreTrainedModel,
        plan: PruningPlan,
        statistics: Statistics | None,
        bypasses: Bypasses | None,
        number: int = 0,
    ) -> tuple[PreTrainedModel, Strength | None]:
        """The pruned model, compensated as strongly as held-out rows say; of too few rows with the default strength."""
        strength = self.calibration.strength(model, plan, statistics, bypasses, number)
        if strength is None and self.calibration.in_order:
            return self.calibration.pruned_in_order(model, plan, number), None
        if strength is not None and strength.in_order is not None:
            return self.calibration.pruned_in_order(model, plan, number, strength.in_order), strength
        ridge = RIDGE if strength is None else strength.ridge
        return prune(model, plan, statistics, bypasses=bypasses, ridge=ridge), strength

    def _takes_over(self, statistics: Statistics | None, bypasses: Bypasses | None, strength: Strength | None) -> bool:
        """Whether anything in a cut took over what was removed."""
        return bool(statistics or bypasses or self.calibration.in_order) and (strength is None or strength.compensates)

    def share(self, student: PreTrainedModel, teacher: PreTrainedModel) -> float:
        """The share of the teacher's cost that the student has."""
        if student is teacher:
            return 1.0
        if self.section.cost == "latency":
            return from_main_process(relative_latency(student, teacher, *self.batch(teacher)) if self.is_main else None)
        return share_of(student, teacher, self.section.cost, *self.batch(teacher))

    def batch(self, model: PreTrainedModel) -> tuple[int, int]:
        """The batch (B, T) that costs are counted or measured for (see `budget_batch`)."""
        return budget_batch(self.recipe, kind_of(model) == "next_token")

    def plan(
        self, model: PreTrainedModel, teacher: PreTrainedModel, statistics: Statistics, share: float
    ) -> PruningPlan:
        """What to keep of a model so that `share` of the teacher's cost is left."""
        section, batch = self.section, self.batch(teacher)
        scores = score(statistics, section.criterion, self.recipe.seed, section.layer_criterion)
        if section.cost == "latency":
            settings = LatencySettings(*batch, dense=teacher, costs=latency_costs(teacher, *batch))
            return plan_for_latency(model, scores, share, settings, self.rules)
        left = min(1.0, share / self.share(model, teacher))
        costs = unit_costs(model, section.cost, *self.batch(model))
        return plan_for_costs(model, scores, left, costs, self.rules)


def kept_after(keep: float, number: int, rounds: int, schedule: str) -> float:
    """The share of the teacher's layers that stays after round `number` of `rounds`.

    "linear" removes the same share in every round; "cubic" removes most in the first ones (Zhu and Gupta 2017, equation 1).
    """
    left = 1 - number / rounds
    return keep + (1 - keep) * (left if schedule == "linear" else left**3)
