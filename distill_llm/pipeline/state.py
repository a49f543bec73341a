"""`state.json`: what a run was begun with and which of its stages are done. It tells by itself whether it is whole."""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.seals import Seal
from distill_llm.recipe.recipe import BACKUP, STATE

CHECK = "check"


@dataclass(frozen=True)
class State:
    """What a run folder knows. All of it is plain JSON.

    Attributes:
        recipe: the resolved recipe of the last start.
        inputs: by field of the recipe, what it named when the run began (see `pipeline.inputs`).
        stages: by name, the results of finished stages.
        files: by name, the seal of what a finished stage left in the run folder.
    """

    recipe: Mapping[str, Any]
    inputs: Mapping[str, Any] = field(default_factory=dict)
    stages: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    files: Mapping[str, Seal] = field(default_factory=dict)

    def without(self, names: Collection[str]) -> "State":
        """The state in which these stages are not done."""
        stages, files = (
            {name: each for name, each in part.items() if name not in names} for part in (self.stages, self.files)
        )
        return replace(self, stages=stages, files=files)

    def with_stage(self, name: str, result: dict[str, Any], files: Seal) -> "State":
        """The state in which a stage is done."""
        return replace(self, stages={**self.stages, name: result}, files={**self.files, name: files})


def write_state(folder: Path, state: State) -> None:
    """Write the state, and a copy that stands in for it.

    Raises:
        TypeError: something in it is not plain JSON.
    """
    record = json.loads(json.dumps(asdict(state)))
    text = json.dumps({**record, CHECK: _check_of(record)}, indent=2) + "\n"
    for name in (BACKUP, STATE):
        with written_whole(folder / name) as path:
            path.write_text(text, encoding="utf-8")


def read_state(folder: Path) -> State | None:
    """The state of a run; None where none was begun.

    Raises:
        InputError: neither of the two files is whole.
    """
    there = [path for name in (STATE, BACKUP) if (path := folder / name).is_file()]
    for path in there:
        if (state := _read(path)) is not None:
            return state
    if not there:
        return None
    fix = f"put back a copy of it, or use another output_dir: {' and '.join(path.name for path in there)}"
    raise InputError("output_dir", str(folder), fix=f"{fix} {'is' if len(there) == 1 else 'are'} damaged")


def _read(path: Path) -> State | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check = record.pop(CHECK)
        return State(**record) if check == _check_of(record) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _check_of(record: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()
