"""The run folder: what is done is on disk, written whole or not at all, so the same command continues after a stop."""

import json
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from accelerate.utils.memory import clear_device_cache
from transformers import TrainerCallback

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.finite import NotFinite
from distill_llm.common.outputs import usable_output
from distill_llm.common.processes import open_processes
from distill_llm.pipeline.stage import Result, Stage, stale
from distill_llm.recipe.recipe import RECIPE

COMPLETE = "complete"
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

    Raises:
        InputError: if the folder holds a run of another recipe, or files that are not a run's.
    """

    def __init__(
        self, folder: Path, recipe_yaml: str, stages: Sequence[Stage] = (), own_sections: Collection[str] = ()
    ):
        self.folder = folder
        self.processes = open_processes()
        own = folder / RECIPE
        usable_output(folder, begun=RECIPE)
        before = own.read_text() if own.is_file() else None
        if before is not None:
            _same_recipe(folder, before, recipe_yaml, {*FREE, *own_sections})
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            recipes = [yaml.safe_load(text) for text in (before or recipe_yaml, recipe_yaml)]
            self._forget(stale(stages, self.results.keys(), *recipes))
        if self.processes.is_main_process and before != recipe_yaml:
            with written_whole(own) as path:
                path.write_text(recipe_yaml)
        self.processes.wait_for_everyone()

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Result of every finished stage by its name."""
        path = self.folder / "state.json"
        return json.loads(path.read_text())["stages"] if path.is_file() else {}

    def result(self, stage: Stage) -> Result:
        """The result of a stage: from disk if it is done, else by doing its work and keeping the result."""
        done = self.results
        if stage.name in done:
            return done[stage.name]
        start = time.monotonic()
        try:
            result = stage.work(done) if stage.together or self.processes.is_main_process else None
        except NotFinite as error:
            raise error.in_stage(stage.name) from error
        clear_device_cache(garbage_collection=True)  # the models of a stage make room for those of the next
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            if missing := [str(path) for path in stage.outputs if not path.exists()]:
                raise FileNotFoundError(f"stage {stage.name} did not write {', '.join(missing)}")
            done[stage.name] = {**(result or {}), "seconds": round(time.monotonic() - start, 2)}
            try:
                self._write(done)
            except TypeError as error:
                fix = "return plain JSON from its work: numbers, strings, lists and mappings"
                raise InputError(f"stage {stage.name}", str(error), fix=fix) from error
        self.processes.wait_for_everyone()
        return self.results[stage.name]

    def _forget(self, names: Collection[str]) -> None:
        if names:
            self._write({name: result for name, result in self.results.items() if name not in names})

    def _write(self, results: Mapping[str, Any]) -> None:
        with written_whole(self.folder / "state.json") as path:
            path.write_text(json.dumps({"stages": results}, indent=2) + "\n")


def _same_recipe(folder: Path, old: str, new: str, free: Collection[str]) -> None:
    """What decides the student must be as the run was begun with; how the student is timed and pushed may change."""
    before, after = _deciding(yaml.safe_load(old), free), _deciding(yaml.safe_load(new), free)
    differing = [key for key in after if before.get(key) != after[key]]
    if differing:
        raise InputError(
            "output_dir",
            str(folder),
            f"another folder, or the recipe that this run was begun with: {', '.join(differing)} differ from its recipe.yaml",
        )


def _deciding(recipe: Mapping[str, Any], free: Collection[str]) -> dict[str, Any]:
    """The parts of a recipe that decide the student. Batch sizes do not: one that is too large must not cost a trained run.

    The timed batch does where pruning counts costs for it.
    """
    params = (recipe.get("pruning") or {}).get("cost", "params") == "params"
    batches = ("batch_size", "latency") if params else ("batch_size",)
    evaluation = {name: value for name, value in recipe.get("evaluation", {}).items() if name not in batches}
    return {**{name: value for name, value in recipe.items() if name not in free}, "evaluation": evaluation}


class MarkComplete(TrainerCallback):
    """Marks a Trainer's checkpoint as complete once every process has written its part."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the checkpoint of the current step was saved."""
        processes = open_processes()
        processes.wait_for_everyone()
        if processes.is_main_process:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a Trainer's folder. Process 0 removes incomplete ones."""
    processes = open_processes()
    if processes.is_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / COMPLETE).is_file():
                shutil.rmtree(checkpoint)
    processes.wait_for_everyone()
    whole = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(whole[-1]) if whole else None
