"""The run folder: what is done is on disk, written whole or not at all, so the same command continues after a stop."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils.memory import clear_device_cache

from distill_llm.common.changes import changed
from distill_llm.common.errors import InputError, raise_all
from distill_llm.common.files import remove_parts, written_whole
from distill_llm.common.finite import NotFinite
from distill_llm.common.outputs import usable_output
from distill_llm.common.processes import open_processes
from distill_llm.common.seals import Seal, broken, differences, seal_of
from distill_llm.pipeline.inputs import Inputs, changes
from distill_llm.pipeline.lost import Lost, lost
from distill_llm.pipeline.stage import Result, Stage, stale
from distill_llm.pipeline.state import State, read_state, write_state
from distill_llm.pruning.statistics.processes import from_main_process
from distill_llm.recipe.recipe import BACKUP, RECIPE, STATE, parse_recipe

CARD = "README.md"
FREE = ("output_dir", "description")
"""Sections of a recipe that may change in any run: a folder can be moved. So may those that a stage alone reads."""


class RunFolder:
    """A run's folder and the results of its finished stages (`state.json`).

    All processes of a run share the folder; process 0 writes, the others read.

    Args:
        folder: made if it does not exist.
        recipe_yaml: the resolved recipe, kept as `recipe.yaml`. Stages that it makes stale are forgotten, to be done anew.
        stages: of the recipe.
        own_sections: sections of the recipe that a stage alone reads.
        inputs: makes the fingerprints of what the recipe names, given those of the first start.

    Attributes:
        notes: lines for the user, on what is done again since its files are gone or damaged.

    Raises:
        InputError: if the folder holds a run of another recipe, files that are not a run's, or a trained model that is damaged;
            or if something that the recipe names has changed.
    """

    def __init__(
        self,
        folder: Path,
        recipe_yaml: str,
        stages: Sequence[Stage] = (),
        own_sections: Collection[str] = (),
        inputs: Callable[[Inputs], Inputs] | None = None,
    ):
        self.folder, self.stages, self.processes = folder, stages, open_processes()
        usable_output(folder, begun=(RECIPE, STATE, BACKUP))
        recipe, known = yaml.safe_load(recipe_yaml), read_state(folder)
        before = _begun_with(folder, known)
        check_same_recipe(folder, recipe, own_sections)
        own = inputs(known.inputs if known is not None else {}) if inputs and self.processes.is_main_process else {}
        own = from_main_process(own)
        if known is not None:
            raise_all(changes(known.inputs, own, recipe))
        found = Lost()
        if self.processes.is_main_process:
            remove_parts(folder)
            self._begin(known or State(recipe, own), known is None, recipe, before or recipe)
            keep_recipe(folder, recipe_yaml)
            found = lost(stages, self.results, self._broken)
        found = from_main_process(found)
        raise_all([InputError("output_dir", str(folder / name), fix=fix) for name, fix in found.faults])
        self.notes, self._again = found.notes, set(found.again)
        self.processes.wait_for_everyone()

    @property
    def state(self) -> State:
        """What is on disk."""
        state = read_state(self.folder)
        assert state is not None
        return state

    @property
    def results(self) -> Mapping[str, dict[str, Any]]:
        """Result of every finished stage by its name."""
        return self.state.stages

    def has(self, stage: Stage) -> bool:
        """Whether a stage is done, so that its result is read."""
        return stage.name in self.results and stage.name not in self._again

    def result(self, stage: Stage) -> Result:
        """The result of a stage: from disk if it is done, else by doing its work and keeping the result."""
        done = self.results
        if self.has(stage):
            return done[stage.name]
        start = time.monotonic()
        earlier = {each.name: done[each.name] for each in stage.earlier}
        try:
            result = stage.work(earlier) if stage.together or self.processes.is_main_process else None
        except NotFinite as error:
            raise error.in_stage(stage.name) from error
        clear_device_cache(garbage_collection=True)  # the models of a stage make room for those of the next
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            if missing := [str(path) for path in stage.outputs if not path.exists()]:
                raise FileNotFoundError(f"stage {stage.name} did not write {', '.join(missing)}")
            try:
                self._keep(stage, {**(result or {}), "seconds": round(time.monotonic() - start, 2)})
            except TypeError as error:
                fix = "return plain JSON from its work: numbers, strings, lists and mappings"
                raise InputError(f"stage {stage.name}", str(error), fix=fix) from error
        self._again.discard(stage.name)
        self.processes.wait_for_everyone()
        return self.results[stage.name]

    def _begin(self, state: State, is_new: bool, recipe: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Keep the state of this start: without what the recipe made stale."""
        names = stale(self.stages, state.stages.keys(), before, recipe)
        self._tidy(
            names if not is_new else {stage.name for stage in self.stages}
        )  # a run that nobody knows anything of
        changed = replace(state.without(names), recipe=recipe)
        if is_new or changed != state:
            write_state(self.folder, changed)

    def _keep(self, stage: Stage, result: dict[str, Any]) -> None:
        """Keep a result with the seal of its files. If these are others than before, what was made from them is not done."""
        state, files = self.state, self._seal(stage)
        if stage.name in self._again and differences(state.files.get(stage.name, {}), files):
            others = state.without([stage.name]).stages.keys()
            names = stale(self.stages, others, {}, {})
            self._tidy(names)
            state = state.without(names)
        write_state(self.folder, state.with_stage(stage.name, result, files))

    def _seal(self, stage: Stage) -> Seal:
        files = [file for path in stage.outputs for file in ([path] if path.is_file() else path.rglob("*"))]
        return seal_of(files, self.folder)

    def _broken(self, stage: Stage) -> dict[str, str]:
        """Files of a finished stage that are gone or damaged. A card may change, as long as there is one: people edit it."""
        found = broken(self.state.files.get(stage.name, {}), self.folder)
        edited = {name for name in found if Path(name).name == CARD and (self.folder / name).is_file()}
        return {
            name: what for name, what in found.items() if name not in edited or not (self.folder / name).stat().st_size
        }

    def _tidy(self, names: Collection[str]) -> None:
        """Remove what stages that are to be done anew would go on with."""
        for stage in self.stages:
            if stage.name in names:
                stage.tidy()


def _begun_with(folder: Path, state: State | None) -> Mapping[str, Any] | None:
    """The resolved recipe of a run's last start; None where there is none.

    Fields that the version of that start did not know have their defaults: they did not change, so nothing is done again.
    """
    recipe = state.recipe if state is not None else _recipe_in(folder)
    if recipe is None:
        return None
    try:
        return dict(parse_recipe(dict(recipe)).model_dump(mode="json"))
    except InputError:  # it has fields that this version no longer knows: the user is told what they are
        return recipe


def _recipe_in(folder: Path) -> Mapping[str, Any] | None:
    """The recipe of a run whose state is gone; None where there is none."""
    file = folder / RECIPE
    if not file.is_file():
        return None
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
        if isinstance(recipe, dict):
            return recipe
    except (OSError, ValueError, yaml.YAMLError):
        pass
    raise InputError("output_dir", str(folder), fix=f"use another one: its {RECIPE} is damaged, and {STATE} is gone")


def keep_recipe(folder: Path, recipe_yaml: str) -> None:
    """Write `recipe.yaml` where it is another text, or damaged."""
    file, text = folder / RECIPE, recipe_yaml.encode()
    if not file.is_file() or file.read_bytes() != text:
        with written_whole(file) as path:
            path.write_bytes(text)


def check_same_recipe(folder: Path, recipe: Mapping[str, Any], own_sections: Collection[str]) -> None:
    """Check that the run of a folder, if it has begun, was begun with this resolved recipe.

    Raises:
        InputError: naming what changed.
    """
    if (before := _begun_with(folder, read_state(folder))) is not None:
        _same_recipe(folder, before, recipe, {*FREE, *own_sections})


def _same_recipe(folder: Path, old: Mapping[str, Any], new: Mapping[str, Any], free: Collection[str]) -> None:
    """What decides the student must be as the run was begun with; how the student is timed and pushed may change."""
    before, after = _deciding(old, free), _deciding(new, free)
    if found := changed(before, after):
        fix = f"set another one, or undo what changed since this run was begun: {found}"
        raise InputError("output_dir", str(folder), fix=fix)


def _deciding(recipe: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """The parts of a recipe that decide the student. Benchmarks do not, and may be added later. Batch sizes do not: one that is
    too large must not cost a trained run. The timed batch does where pruning counts costs for it.
    """
    params = (recipe.get("pruning") or {}).get("cost", "params") == "params"
    after = ("harness", "batch_size", "latency") if params else ("harness", "batch_size")
    evaluation = {name: value for name, value in recipe.get("evaluation", {}).items() if name not in after}
    sections = {name: value for name, value in recipe.items() if name not in free}
    if sections.get("pruning"):  # where statistics are kept decides nothing: a file of others is not used
        sections["pruning"] = {name: value for name, value in sections["pruning"].items() if name != "statistics"}
    return {**sections, "evaluation": evaluation}
