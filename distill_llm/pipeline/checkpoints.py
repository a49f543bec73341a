"""Checkpoints of a training that may be stopped at any moment: only those that are whole are gone on from."""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from distill_llm.common.files import to_disk, written_whole
from distill_llm.common.processes import open_processes
from distill_llm.common.seals import broken, seal_of

COMPLETE = "complete.json"
"""The seal of a checkpoint's files, written when all of them are on the disk."""


class MarkComplete(TrainerCallback):
    """Marks a Trainer's checkpoint as complete once every process has written its part."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the checkpoint of the current step was saved."""
        processes = open_processes()
        processes.wait_for_everyone()
        if processes.is_main_process:
            checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            to_disk(checkpoint)
            with written_whole(checkpoint / COMPLETE) as path:
                path.write_text(json.dumps(seal_of(_files(checkpoint), checkpoint)) + "\n")


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a Trainer's folder. Process 0 removes incomplete ones, and those after a damaged one.

    A later checkpoint may name an earlier one as the best so far, so none is of use after one that is damaged.
    """
    processes = open_processes()
    if processes.is_main_process:
        is_whole = True
        for checkpoint in _checkpoints(folder):
            is_whole = is_whole and _is_whole(checkpoint)
            if not is_whole:
                shutil.rmtree(checkpoint)
    processes.wait_for_everyone()
    whole = _checkpoints(folder)
    return str(whole[-1]) if whole else None


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_whole(checkpoint: Path) -> bool:
    try:
        seal = json.loads((checkpoint / COMPLETE).read_text())
        return bool(seal) and not broken(seal, checkpoint)
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        return False


def _files(checkpoint: Path) -> list[Path]:
    return [file for file in checkpoint.rglob("*") if file.name != COMPLETE]
