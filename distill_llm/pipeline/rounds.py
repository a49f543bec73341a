"""The removal of a round: what every unit is worth, the plan, and the cut itself, once or several times over."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.common.files import written_whole
from distill_llm.common.progress import progress_bar
from distill_llm.losses.items import kind_of
from distill_llm.measuring.clocks import relative_latency
from distill_llm.models.fingerprints import teacher_fingerprint
from distill_llm.pruning.compensation.bypass import Bypasses, fit_bypasses, outputs_taken_over
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.importance import score
from distill_llm.pruning.plan import PruningPlan, keep_layers
from distill_llm.pruning.planning.budgets import share_of
from distill_llm.pruning.planning.candidate import Limits
from distill_llm.pruning.planning.latency import latency_costs, plan_for_latency
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.planning.small_cuts import compose_plans, cut_shares
from distill_llm.pruning.statistics.calibration_pass import CalibrationPass
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.layer_moments import LayerMoments
from distill_llm.pruning.statistics.leave_one_out import leave_one_out
from distill_llm.pruning.statistics.processes import from_main_process, process
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.recipe.recipe import Recipe, budget_batch

Batches = Iterable[Mapping[str, torch.Tensor]]


@dataclass(frozen=True)
class Cut:
    """What a removal came to.

    Attributes:
        plan: for the model that was cut.
        model: what is left of it, compensated if that was asked for.
        kept: the share of the teacher's cost that is left.
        compensated: whether anything took over what was removed.
    """

    plan: PruningPlan
    model: PreTrainedModel
    kept: float
    compensated: bool


class Cutter:
    """Cuts models as a recipe's pruning section says. All processes of a run call it together.

    Args:
        recipe: checked already, with a pruning section.
        batches: the calibration data of a cut, counted from 0 in every round; the same on every process and at every reading.
        device: computes a layer at a time what models elsewhere do with these data; None: they are where they compute.
    """

    def __init__(self, recipe: Recipe, batches: Callable[[int], Batches], device: torch.device | None = None):
        assert recipe.pruning is not None
        self.recipe, self.section, self.batches, self.device = recipe, recipe.pruning, batches, device
        self.is_main = process()[0] == 0

    def cut(self, student: PreTrainedModel, teacher: PreTrainedModel, keep: float, file: Path | None = None) -> Cut:
        """Remove until `keep` of the teacher's cost is left.

        Args:
            student: unchanged, in eval mode.
            teacher: what `keep` is a share of.
            keep: share of the cost of the teacher's layers; of its latency with cost latency.
            file: where the student's statistics are, or are to be kept.
        """
        plan, model, compensated = None, student, self.section.folds
        for number, share in enumerate(cut_shares(self.share(student, teacher), keep, self.section.cuts)):
            statistics = self.statistics(model, number, None if number else file)
            chosen = from_main_process(self._plan(model, teacher, statistics, share) if self.is_main else None)
            plan = chosen if plan is None else compose_plans(student, plan, chosen)
            bypasses = self._bypasses(model, chosen, number)
            folded = self._with_moments(statistics, model, number) if self.section.folds else None
            model = prune(model, chosen, folded, bypasses=bypasses)
            compensated |= bool(bypasses)
        assert plan is not None and plan.kept is not None
        if self.section.cost == "latency":
            return Cut(plan, model, plan.kept, compensated)
        kept, note = self.share(model, teacher), None
        if abs(kept - keep) > 0.01 * keep:
            note = f"kept {kept:.2%} of the layers' {self.section.cost} where {keep:.2%} was asked for: "
            note += "what may be removed comes in larger steps"
        own = share_of(model, student, self.section.cost, *self.batch(student))
        return Cut(replace(plan, kept=own, note=note), model, kept, compensated)

    def cut_layers(self, student: PreTrainedModel) -> Cut:
        """Keep the layers that the section names."""
        assert self.section.layers is not None
        plan = keep_layers(student, self.section.layers)
        bypasses = self._bypasses(student, plan, 0)
        kept = plan.share(student, self.section.cost, *self.batch(student))
        return Cut(plan, prune(student, plan, bypasses=bypasses), kept, bool(bypasses))

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

    def _plan(
        self, model: PreTrainedModel, teacher: PreTrainedModel, statistics: Statistics, share: float
    ) -> PruningPlan:
        section = self.section
        scores = score(statistics, section.criterion, self.recipe.seed, section.layer_criterion)
        options: dict[str, Any] = {
            "units": section.units,
            "scope": section.scope,
            "round_to": section.round_to,
            "uniform": section.uniform,
            "limits": Limits(section.min_heads, section.min_neurons),
        }
        options |= dict(zip(("batch_size", "sequence_length"), self.batch(model), strict=True))
        if section.cost == "latency":
            costs = latency_costs(teacher, *self.batch(teacher))
            return plan_for_latency(model, scores, share, dense=teacher, costs=costs, **options)
        left = min(1.0, share / self.share(model, teacher))
        return plan_pruning(model, scores, left, cost=section.cost, **options)

    # Statistics.

    @cached_property
    def loss(self) -> str:
        """What gradients are taken of."""
        return self.section.loss or ("labels" if "labels" in next(iter(self.batches(0))) else "kl")

    @cached_property
    def _rows(self) -> str:
        """A hash of the first cut's calibration data."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self.batches(0):
            for name in sorted(batch):
                digest.update(f"{name}{tuple(batch[name].shape)}{batch[name].dtype}".encode())
                digest.update(batch[name].contiguous().numpy().tobytes())
        return digest.hexdigest()

    def statistics(self, model: PreTrainedModel, number: int = 0, file: Path | None = None) -> Statistics:
        """Of the model on a cut's calibration data: from the file where it has all that is needed, else in one pass, and kept
        there. Without a file only what this section needs is collected; with one of the user's also the loss's gradients, so that
        the next criterion finds them.

        On several processes each sees a part of the batches, and all end with the same sums.
        """
        section, loss = self.section, self.loss
        needs_gradients, needs_without = self._needs_gradients, section.needs("leave_one_out")
        users = file is not None and section.statistics is not None and file == section.statistics.expanduser()
        with_loss = needs_gradients or users
        identity: dict[str, Any] = {}
        found: Statistics | None = None
        if file is not None:
            identity = {"model": teacher_fingerprint(model), "rows": self._rows, "precision": section.precision}
            identity |= {"moment_share": section.moment_share} if self.section.holds_moments else {}
            usable = from_main_process(self._usable(file, identity, needs_gradients))
            found = Statistics.load(file) if usable else None
        if found is not None and (found.without is not None or not needs_without):
            return found
        statistics = found or collect_statistics(
            model,
            self._shown(number, "Calibrating"),
            loss if with_loss else None,
            moments=self.section.holds_moments,
            moment_share=section.moment_share,
            hidden_moments=self._hidden_moments,
            hidden=file is not None or "hidden" in section.units,
            precision=self._precision,
            checkpointing=section.checkpointing,
            seed=self.recipe.seed,
            sharded=True,
            device=self.device,
        )
        if needs_without:
            shown, precision = self._shown(number, "Leaving layers out"), self._precision
            statistics = leave_one_out(
                model, shown, statistics, loss, precision=precision, sharded=True, device=self.device
            )
        if file is not None and self.is_main:
            _keep(statistics, file, {**identity, "loss": loss if with_loss or needs_without else None})
        return statistics

    def _with_moments(self, statistics: Statistics, model: PreTrainedModel, number: int) -> Statistics:
        """The statistics of a cut with the second moments that compensation needs."""
        section = self.section
        if section.moment_layers is None or statistics.moments:
            return statistics
        loss = self.loss if self._needs_gradients else None
        calibration = CalibrationPass(
            model,
            loss,
            precision=self._precision,
            checkpointing=section.checkpointing,
            seed=self.recipe.seed,
            sharded=True,
            device=self.device,
        )
        batches = partial(self._shown, number, "Second moments")
        return replace(
            statistics, moments=LayerMoments(calibration, batches, section.moment_layers, section.moment_share)
        )

    def _bypasses(self, model: PreTrainedModel, plan: PruningPlan, number: int) -> Bypasses | None:
        """What the FFNs that stay take over of what a cut's plan removes whole; None where there is nothing to."""
        if not (self.section.compensate and outputs_taken_over(model, plan)):
            return None
        shown = self._shown(number, "Fitting bypasses")
        return fit_bypasses(model, plan, shown, precision=self._precision, sharded=True, device=self.device)

    @property
    def _needs_gradients(self) -> bool:
        return self.section.needs("gradients")

    @property
    def _hidden_moments(self) -> bool:
        """Whether compensation needs second moments of the residual stream."""
        return self.section.compensate and "hidden" in self.section.units

    @property
    def _precision(self) -> torch.dtype | None:
        return None if self.section.precision is None else getattr(torch, self.section.precision)

    def _shown(self, number: int, title: str) -> Batches:
        return progress_bar(self.batches(number), desc=title, leave=False, shown=self.is_main)

    def _usable(self, file: Path, identity: Mapping[str, Any], needs_gradients: bool) -> bool:
        """Whether a file has statistics of this model and these rows, with what this section needs."""
        try:
            record = json.loads(_record_of(file).read_text())
        except (OSError, ValueError):
            return False
        if not file.is_file() or {name: record.get(name) for name in identity} != identity:
            return False
        needs_loss = needs_gradients or self.section.needs("leave_one_out")
        if needs_loss and record.get("loss") not in (self.loss, *([] if needs_gradients else [None])):
            return False
        if self._hidden_moments and not record.get("hidden_moments"):
            return False
        return (record["gradients"] or not needs_gradients) and (record["moments"] or not self.section.holds_moments)


def _record_of(file: Path) -> Path:
    return file.with_suffix(".json")


def _keep(statistics: Statistics, file: Path, record: dict[str, Any]) -> None:
    """The statistics, and beside them what they are of: last, so that it never speaks of another file."""
    _record_of(file).unlink(missing_ok=True)
    with written_whole(file) as path:
        statistics.save(path)
    record |= {"gradients": statistics.has_gradients, "moments": bool(statistics.moments)}
    record |= {"hidden_moments": bool(statistics.hidden_moments)}
    with written_whole(_record_of(file)) as path:
        path.write_text(json.dumps(record) + "\n")


# Costs.
