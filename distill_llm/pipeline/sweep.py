"""A sweep: one recipe at several sizes, or over the values of any fields, and what each of them costs and gains."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from distill_llm.checks.models import check_room
from distill_llm.checks.recipe import open_recipe
from distill_llm.common.errors import InputError, faults_in, raise_all
from distill_llm.common.finite import NotFinite
from distill_llm.common.locks import alone_in
from distill_llm.common.outputs import usable_output
from distill_llm.pipeline.context import Context
from distill_llm.pipeline.estimating import estimate
from distill_llm.pipeline.folder import check_same_recipe
from distill_llm.pipeline.listener import Listener, StageDone
from distill_llm.pipeline.preview import devices_here
from distill_llm.pipeline.run import carry_out
from distill_llm.pipeline.sharing import has_teacher
from distill_llm.pipeline.stages import own_sections
from distill_llm.pipeline.stages.report import Report
from distill_llm.pipeline.stages.teacher import Teacher
from distill_llm.pipeline.state import read_state
from distill_llm.recipe.cells import Cell, cells_of, first_of, teacher_key
from distill_llm.recipe.recipe import Recipe
from distill_llm.report.sweep import RECORD, record_of, write_sweep

LOOKED_AT = 4
"""Cells that the time of a sweep is estimated by; each takes some seconds."""


class InCell(Listener):
    """Tells what the run of a cell does, its stages under the cell's name."""

    def __init__(self, listener: Listener, cell: str):
        self.listener, self.cell = listener, cell

    def say(self, what: Any) -> None:
        """A line, or a rich table."""
        self.listener.say(what)

    def done(self, stage: StageDone) -> None:
        """A stage is finished: `keep-0.5/round-1/prune`."""
        self.listener.done(replace(stage, name=f"{self.cell}/{stage.name}"))


@dataclass(frozen=True)
class CellResult:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        values: by field of the recipe, what sets it apart.
        folder: of the run.
        metrics: the contents of its metrics.json; None where the run came to no end.
        error: why it did not.
    """

    name: str
    values: Mapping[str, Any]
    folder: Path
    metrics: Mapping[str, Any] | None = None
    error: str | None = None


@dataclass(frozen=True)
class SweepResult:
    """What a sweep made: a run per cell, and the files that compare them.

    Attributes:
        record: the contents of sweep.json.
        page: sweep.html, with the trade-off curves.
    """

    cells: tuple[CellResult, ...]
    record: Mapping[str, Any]
    report: Path
    page: Path


@dataclass(frozen=True)
class OpenSweep:
    """A sweep whose cells are all checked.

    Attributes:
        folder: that holds the folders of the cells.
        runs: each cell with what its run needs.
    """

    folder: Path
    runs: tuple[tuple[Cell, Context], ...]

    @property
    def todo(self) -> list[tuple[Cell, Context]]:
        """The cells that are not finished."""
        return [(cell, context) for cell, context in self.runs if not _is_done(context.folder)]

    @property
    def disk(self) -> int:
        """Bytes that the unfinished cells take: a shared teacher once, and shared statistics of the first round."""
        teachers, statistics, own, training = {}, {}, 0, 0
        for cell, context in self.todo:
            disk, rounds = context.opened.disk, cell.recipe.pruning.rounds if cell.recipe.pruning else 1
            teachers[teacher_key(cell.recipe)] = disk.teacher
            statistics[_statistics_of(cell)] = disk.statistics // rounds
            own += disk.students + disk.statistics // rounds * (rounds - 1)
            training = max(training, disk.checkpoints)
        return sum(teachers.values()) + sum(statistics.values()) + own + training


def sweep(
    recipe: Recipe | Mapping[str, Any],
    keep: Sequence[float] = (),
    over: Mapping[str, Sequence[Any]] | None = None,
    output_dir: str | Path | None = None,
    listener: Listener | None = None,
) -> SweepResult:
    """Carry out a recipe at several sizes, or over the values of other fields: every combination is a run of its own.

    Cells whose teacher is the same train it once, and those with the same teacher and calibration rows collect statistics once.
    Called again after a stop it goes on; finished runs are not done again, and further values may be added.

    Args:
        recipe: a `Recipe`, or its plain mapping.
        keep: values of `pruning.keep`.
        over: by field of the recipe (`pruning.criterion`), the values to try.
        output_dir: a folder for the runs, `sweep.json`, `sweep.md` and `sweep.html`; default: the recipe's own with `-sweep`.
        listener: is told what the runs do; by default that is printed.

    Raises:
        InputError: for anything wrong in any cell, before any work.
    """
    opened = open_sweep(recipe, keep, over, output_dir, listener)
    return run_sweep(opened)


def open_sweep(
    recipe: Recipe | Mapping[str, Any],
    keep: Sequence[float] = (),
    over: Mapping[str, Sequence[Any]] | None = None,
    output_dir: str | Path | None = None,
    listener: Listener | None = None,
) -> OpenSweep:
    """Check every cell of a sweep before any work. Arguments and errors: as for `sweep`."""
    if keep and "pruning.keep" in (over or {}):
        raise InputError("over", "pruning.keep", fix="remove it, or `keep`: both give sizes")
    over = {**({"pruning.keep": list(keep)} if keep else {}), **(over or {})}
    recipe = recipe if isinstance(recipe, Recipe) else first_of(recipe, over)
    folder = Path(output_dir).expanduser() if output_dir is not None else _beside(recipe.output_dir)
    usable_output(folder, begun=RECORD)
    cells = cells_of(recipe, over, folder)
    contexts: list[Context] = []
    faults: dict[str, InputError] = {}
    for cell in cells:
        try:
            check_same_recipe(cell.recipe.output_dir, yaml.safe_load(cell.recipe.to_yaml()), own_sections())
            contexts.append(Context(open_recipe(cell.recipe), InCell(listener or Listener(), cell.name)))
        except InputError as error:
            faults |= {str(fault): fault for fault in faults_in(error)}
    raise_all([*faults.values(), *_hub_faults(cells, folder)])
    opened = OpenSweep(folder, tuple(zip(cells, contexts, strict=True)))
    check_room(folder, opened.disk)
    return opened


def seconds_of(opened: OpenSweep) -> float:
    """About the time that the unfinished cells will take on this machine, on paper; a shared teacher counts once.

    Of many cells some are looked at, and the others are taken for their like.

    Raises:
        InputError: models too large to measure a rate with, or a recipe that cannot be estimated.
    """
    todo, rate, own, teacher = opened.todo, None, [], 0.0
    for cell, _ in todo[:: math.ceil(len(todo) / LOOKED_AT)]:
        found = estimate(cell.recipe, devices_here(), rate, gpu=torch.cuda.is_available())
        rate = found.rate / 1e12
        seconds = {stage.name: stage.flops / found.rate for stage in found.stages}
        teacher = max(teacher, seconds.pop(Teacher.name))
        own.append(sum(seconds.values()))
    trained = {teacher_key(cell.recipe) for cell, context in opened.runs if has_teacher(context.folder)}
    untrained = {teacher_key(cell.recipe) for cell, _ in todo} - trained
    return len(todo) * sum(own) / len(own) + len(untrained) * teacher


def run_sweep(opened: OpenSweep) -> SweepResult:
    """Carry out the cells of a sweep. The files that compare them are written anew after each."""
    with alone_in(opened.folder):
        usable_output(opened.folder, begun=RECORD)  # another command may have filled it since it was checked
        return _run_cells(opened)


def _run_cells(opened: OpenSweep) -> SweepResult:
    results = {cell.name: CellResult(cell.name, cell.values, context.folder) for cell, context in opened.runs}
    teachers: dict[str, Path] = {}
    lost: dict[str, str] = {}
    for cell, context in opened.runs:
        if has_teacher(context.folder):
            teachers.setdefault(teacher_key(cell.recipe), context.folder)
    done = _write(opened, results.values())
    for number, (cell, context) in enumerate(opened.runs, 1):
        context.say(f"[{number}/{len(results)}] {cell.name}")
        key, found = teacher_key(cell.recipe), None
        error = lost.get(key)
        if error is None:
            try:
                found = carry_out(context, teachers.get(key)).metrics
            except NotFinite as fault:  # the other cells may well be finite
                error = str(fault)
                if fault.stage == Teacher.name:  # that of others is the same, and would be trained in vain
                    lost[key] = error
        results[cell.name] = CellResult(cell.name, cell.values, context.folder, found, error)
        if error is not None:
            context.say(f"{cell.name}: {error}")
        if has_teacher(context.folder):
            teachers.setdefault(key, context.folder)
        done = _write(opened, results.values())
    return done


def _write(opened: OpenSweep, results: Iterable[CellResult]) -> SweepResult:
    """Write what is known so far."""
    cells, context = tuple(results), opened.runs[0][1]
    record = record_of([(each.name, each.values, each.metrics, each.error) for each in cells])
    if context.processes.is_main_process:
        write_sweep(opened.folder, record)
    return SweepResult(cells, record, opened.folder / "sweep.md", opened.folder / "sweep.html")


def _is_done(folder: Path) -> bool:
    state = read_state(folder)
    return state is not None and Report.name in state.stages


def _statistics_of(cell: Cell) -> str:
    """What tells whether two cells share statistics."""
    pruning = cell.recipe.pruning
    return str(pruning.statistics if pruning is not None and pruning.statistics is not None else cell.name)


def _beside(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-sweep")


def _hub_faults(cells: Sequence[Cell], folder: Path) -> list[InputError]:
    """Faults where one student would replace another on the Hub."""
    targets = [cell.recipe.hub.repo_id for cell in cells if cell.recipe.hub is not None]
    twice = next((target for target in targets if targets.count(target) > 1), None)
    fix = f"remove it, and push the student that you choose: distill-llm push {folder}/CELL/student {twice}"
    return [] if twice is None else [InputError("hub.repo_id", twice, fix=fix)]
