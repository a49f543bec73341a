"""What a round's cuts learn from calibration data: statistics, kept in a file, second moments, and bypasses."""

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from distill_llm.common.errors import raise_all
from distill_llm.common.files import written_whole
from distill_llm.common.locks import LOCK, held
from distill_llm.common.precision import mixed_precision
from distill_llm.common.processes import open_processes
from distill_llm.common.progress import progress_bar
from distill_llm.common.seals import seal_of
from distill_llm.models.fingerprints import teacher_fingerprint
from distill_llm.pruning.compensation.bypass import Bypasses, fit_bypasses, outputs_taken_over
from distill_llm.pruning.compensation.in_order import DEFAULT_IN_ORDER, InOrder
from distill_llm.pruning.compensation.layer_runs import adding_faults
from distill_llm.pruning.cutting.in_order import prune_in_order
from distill_llm.pruning.cutting.strength import Strength, choose_strength
from distill_llm.pruning.plan import PruningPlan
from distill_llm.pruning.statistics.calibration_pass import Batches, CalibrationPass
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.layer_moments import LayerMoments
from distill_llm.pruning.statistics.leave_one_out import leave_one_out
from distill_llm.pruning.statistics.processes import from_main_process, process
from distill_llm.pruning.statistics.record import Statistics, UnitStatistics
from distill_llm.pruning.statistics.refit import refit_costs
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.recipe.calibration import HELD_OUT
from distill_llm.recipe.pruning import PruningSection

LONGEST_WAIT = 600
"""Seconds that a run waits for another one that reads or writes the statistics that they share."""


class Calibration:
    """Passes over calibration data, with what a pruning section needs of them. All processes of a run call it together.

    One batch in five is held out: nothing is fitted to it, and the strength of compensation is chosen by it.

    Args:
        section: a checked pruning section.
        seed: of what is drawn at random.
        batches, device: see `Cutter`.
    """

    def __init__(
        self, section: PruningSection, seed: int, batches: Callable[[int], Batches], device: torch.device | None = None
    ):
        self.section, self.every, self.is_main = section, batches, process()[0] == 0
        self.settings = CalibrationSettings(
            moments=section.holds_moments,
            moment_share=section.moment_share,
            hidden="hidden" in section.units,
            hidden_moments=bool(section.compensate) and "hidden" in section.units,
            weight_gradients=section.needs("weight_gradients"),
            precision=mixed_precision(section.precision, device),
            checkpointing=section.checkpointing,
            seed=seed,
            sharded=True,
            device=device,
        )

    def batches(self, number: int, held_out: bool = False) -> list[Mapping[str, torch.Tensor]]:
        """A cut's batches: those that it is measured on and fitted to, or those that are held out."""
        return [batch for i, batch in enumerate(self.every(number)) if (i % HELD_OUT == HELD_OUT - 1) == held_out]

    @cached_property
    def loss(self) -> str:
        """What gradients are taken of."""
        return self.section.loss or ("labels" if "labels" in next(iter(self.batches(0))) else "kl")

    def statistics(self, model: PreTrainedModel, number: int = 0, file: Path | None = None) -> Statistics:
        """The statistics of a model on a cut's calibration data.

        They are read from the file if it has all that is needed; otherwise one pass collects them and they are kept there.
        Without a file only what the section needs is collected. A file that the user named also gets gradients, so that the
        next criterion finds them. On several processes each sees a part of the batches, and all end with the same sums.
        """
        section, settings = self.section, self.settings
        kept, found = None, None
        if file is not None:
            settings = replace(settings, hidden=True)
            kept = StatisticsFile(file, self._identity(model))
            found = kept.read(self._wanted())
        needs_without = section.needs("leave_one_out")
        if found is not None and (found.without is not None or not needs_without):
            return self._with_refit(found, model, number)
        users = file is not None and section.statistics is not None and file == section.statistics.expanduser()
        loss = self.loss if section.needs("gradients") or users else None
        statistics = found or collect_statistics(model, self._shown(number, "Calibrating"), loss, settings=settings)
        if needs_without:
            shown = self._shown(number, "Leaving layers out")
            statistics = leave_one_out(model, shown, statistics, self.loss, settings)
        complete = self._with_refit(statistics, model, number)
        if kept is not None and self.is_main:
            # Costs from moments that are not kept are not kept either: the file's record does not say what those were of.
            kept.write(complete if statistics.moments else statistics, self.loss if needs_without else loss)
        return complete

    def _with_refit(self, statistics: Statistics, model: PreTrainedModel, number: int) -> Statistics:
        """The statistics with costs of removal after compensation, where a criterion needs them."""
        if statistics.has_refit or not self.section.needs("refit"):
            return statistics
        return replace(refit_costs(model, self.with_moments(statistics, model, number)), moments=statistics.moments)

    def with_moments(self, statistics: Statistics, model: PreTrainedModel, number: int = 0) -> Statistics:
        """A cut's statistics with the second moments that compensation needs, a few layers at a time with `moment_layers`."""
        at_once = self.section.moment_layers
        if at_once is None or statistics.moments:
            return statistics
        loss = self.loss if self.section.needs("gradients") else None
        calibration = CalibrationPass(model, loss, settings=self.settings)
        batches = partial(self._shown, number, "Second moments")
        return replace(statistics, moments=LayerMoments(calibration, batches, at_once))

    def bypasses(self, model: PreTrainedModel, plan: PruningPlan, number: int = 0) -> Bypasses | None:
        """What the FFNs that stay take over of what a cut's plan removes whole; None where they take over nothing."""
        if not (self.section.compensate and outputs_taken_over(model, plan)):
            return None
        return fit_bypasses(model, plan, self._shown(number, "Fitting bypasses"), self.settings)

    def strength(
        self,
        model: PreTrainedModel,
        plan: PruningPlan,
        statistics: Statistics | None,
        bypasses: Bypasses | None,
        number: int,
    ) -> Strength | None:
        """How strongly to compensate a cut, the same on every process; None if there is nothing to, or no row to choose by."""
        held_out = self.batches(number, held_out=True)
        fitted_to = self.batches(number) if self.in_order else None
        if not held_out or not (statistics or bypasses or fitted_to):
            return None
        found = choose_strength(
            model, plan, statistics, held_out, bypasses=bypasses, in_order=fitted_to, settings=self.settings
        )
        return from_main_process(found if self.is_main else None)

    @property
    def in_order(self) -> bool:
        """Whether linears may be fitted in order."""
        return self.section.compensate == "in_order"

    def check_in_order(self, model: PreTrainedModel) -> None:
        """Raise InputError if linears are to be fitted in order and this model's cannot be, as its outputs for one row show."""
        for batch in self.batches(0)[:1] if self.in_order else ():
            raise_all(adding_faults(model, batch, self.settings, "pruning.compensate"))

    def pruned_in_order(
        self, model: PreTrainedModel, plan: PruningPlan, number: int, how: InOrder = DEFAULT_IN_ORDER
    ) -> PreTrainedModel:
        """A cut's model with its linears fitted in order."""
        return prune_in_order(model, plan, self._shown(number, "Fitting in order"), how, settings=self.settings)

    def _shown(self, number: int, title: str) -> Batches:
        return progress_bar(self.batches(number), desc=title, leave=False, shown=self.is_main)

    def _wanted(self) -> "Wanted":
        needs_gradients, settings = self.section.needs("gradients"), self.settings
        losses: tuple[str | None, ...] = ()
        if self.section.reads_loss:
            losses = (self.loss,) if needs_gradients else (self.loss, None)
        return Wanted(needs_gradients, settings.moments, settings.hidden_moments, settings.weight_gradients, losses)

    def _identity(self, model: PreTrainedModel) -> dict[str, Any]:
        """What statistics depend on: the model with its dtypes, the rows, and how they are computed."""
        precision = None if self.settings.precision is None else str(self.settings.precision).removeprefix("torch.")
        identity: dict[str, Any] = {"model": teacher_fingerprint(model), "rows": self._rows, "precision": precision}
        identity["of units"] = [field.name for field in fields(UnitStatistics)]
        return identity | (
            {"moment_share": self.section.moment_share, "token_weights": "squared gradients"}
            if self.settings.moments
            else {}
        )

    @cached_property
    def _rows(self) -> str:
        """A hash of the first cut's calibration data."""
        digest = hashlib.blake2b(digest_size=16)
        for batch in self.batches(0):
            for name in sorted(batch):
                digest.update(f"{name}{tuple(batch[name].shape)}{batch[name].dtype}".encode())
                digest.update(batch[name].contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Wanted:
    """What statistics must hold to be of use.

    Attributes:
        gradients, moments, hidden_moments, weight_gradients: whether they must have these.
        losses: what their gradients may be of; empty: of anything.
    """

    gradients: bool
    moments: bool
    hidden_moments: bool
    weight_gradients: bool
    losses: tuple[str | None, ...]


@dataclass(frozen=True)
class StatisticsFile:
    """A file of statistics, and a record beside it that says what they are of and seals the file.

    Several runs may share a file: while one reads or writes, the others wait.

    Attributes:
        path: the file; the record has the same name with `.json`.
        identity: what the statistics depend on: the model, the rows and how they are computed.
    """

    path: Path
    identity: dict[str, Any]

    @property
    def _record(self) -> Path:
        return self.path.with_suffix(".json")

    def has(self, wanted: Wanted) -> bool:
        """Whether there are statistics of this identity with all that is wanted."""
        try:
            record = json.loads(self._record.read_text())
        except (OSError, ValueError, RecursionError):
            return False
        if not isinstance(record, dict) or {name: record.get(name) for name in self.identity} != self.identity:
            return False
        if record.get("file") != self._content:
            return False
        if wanted.losses and record.get("loss") not in wanted.losses:
            return False
        parts = ("gradients", "moments", "hidden_moments", "weight_gradients")
        return all(record.get(part) for part in parts if getattr(wanted, part))

    def read(self, wanted: Wanted) -> Statistics | None:
        """The statistics where they are there with all that is wanted, and whole. All processes of a run call it together."""
        with ExitStack() as stack:
            there = False
            if process()[0] == 0:
                stack.enter_context(self._alone())
                there = self.has(wanted)
            found = Statistics.load(self.path) if from_main_process(there) else None
            open_processes().wait_for_everyone()  # the others read while process 0 keeps other runs out
        return found

    def write(self, statistics: Statistics, loss: str | None) -> None:
        """Replace the statistics, then the record. A record that speaks of other statistics is none: it knows their content."""
        has = {"gradients": statistics.has_gradients, "moments": bool(statistics.moments)}
        has |= {"hidden_moments": bool(statistics.hidden_moments), "weight_gradients": statistics.has_weight_gradients}
        with self._alone():
            with written_whole(self.path) as path:
                statistics.save(path)
            with written_whole(self._record) as path:
                path.write_text(json.dumps({**self.identity, "loss": loss, **has, "file": self._content}) + "\n")

    @property
    def _content(self) -> str | int | None:
        """A hash of the file; None where there is none."""
        seal = seal_of([self.path], self.path.parent)
        return seal[self.path.name][2] if seal else None

    def _alone(self) -> AbstractContextManager[None]:
        lock = self.path.with_name(f".{self.path.name}{LOCK}")
        return held(lock, "pruning.statistics", self.path, LONGEST_WAIT)
