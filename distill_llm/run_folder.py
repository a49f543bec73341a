"""The run folder: what is done is on disk, written whole or not at all, so the same command goes on where it stopped."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import TrainerCallback

from distill_llm.errors import InputError

COMPLETE = "complete"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A path to write to, file or folder, that takes the place of `path` only when the block has ended without error."""
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    if path.is_dir():
        shutil.rmtree(path)  # only a file is replaced in one step
    os.replace(partial, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


class RunFolder:
    """A run's folder and the results of its finished stages (`state.json`).

    All processes of a run share the folder; process 0 writes, the others read.

    Args:
        folder: made if it does not exist.
        recipe_yaml: the resolved recipe, kept as `recipe.yaml`.

    Raises:
        InputError: if the folder holds a run of another recipe, or files that are not a run's.
    """

    def __init__(self, folder: Path, recipe_yaml: str):
        self.folder = folder
        self.processes = PartialState()
        own = folder / "recipe.yaml"
        if own.is_file():
            _same_recipe(folder, own.read_text(), recipe_yaml)
        elif folder.is_dir() and any(path.suffix != ".partial" for path in folder.iterdir()):
            raise InputError(
                "output_dir", str(folder), "an empty or new folder, or one with an earlier run of this recipe"
            )
        self.processes.wait_for_everyone()
        if self.processes.is_main_process and not own.is_file():
            with written_whole(own) as path:
                path.write_text(recipe_yaml)
        self.processes.wait_for_everyone()

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """Result of every finished stage by its name."""
        path = self.folder / "state.json"
        return json.loads(path.read_text())["stages"] if path.is_file() else {}

    @property
    def seconds(self) -> float:
        """Time spent in the stages that are done, over all starts."""
        return sum(result["seconds"] for result in self.results.values())

    def stage(self, name: str, work: Callable[[], dict[str, Any] | None], everyone: bool = False) -> dict[str, Any]:
        """The result of a stage: from disk if it is done, else by doing its work and keeping the result.

        Args:
            work: returns the result (plain JSON); called on process 0, or on all with `everyone`, where process 0's counts.
        """
        done = self.results
        if name in done:
            return done[name]
        start = time.monotonic()
        result = work() if everyone or self.processes.is_main_process else None
        self.processes.wait_for_everyone()
        if self.processes.is_main_process:
            done[name] = {**(result or {}), "seconds": round(time.monotonic() - start, 2)}
            with written_whole(self.folder / "state.json") as path:
                path.write_text(json.dumps({"stages": done}, indent=2) + "\n")
        self.processes.wait_for_everyone()
        return self.results[name]


def _same_recipe(folder: Path, old: str, new: str) -> None:
    """The run folder's own name may differ (a folder can be moved); anything else makes it another run."""
    before, after = yaml.safe_load(old), yaml.safe_load(new)
    differing = [key for key in after if key not in ("output_dir", "description") and before.get(key) != after[key]]
    if differing:
        raise InputError(
            "output_dir",
            str(folder),
            f"another folder, or the recipe that this run was begun with: {', '.join(differing)} differ from its recipe.yaml",
        )


class MarkComplete(TrainerCallback):
    """Marks a Trainer's checkpoint as whole once every process has written its part."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the checkpoint of the current step was saved."""
        processes = PartialState()
        processes.wait_for_everyone()
        if processes.is_main_process:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint of a Trainer's folder; process 0 removes those that were cut off."""
    processes = PartialState()
    if processes.is_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / COMPLETE).is_file():
                shutil.rmtree(checkpoint)
    processes.wait_for_everyone()
    whole = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return str(whole[-1]) if whole else None
