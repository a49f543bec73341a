"""The report of a finished run, made again from what its folder holds."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from distill_llm.common.errors import InputError
from distill_llm.common.files import full_disk_named
from distill_llm.common.locks import alone_in
from distill_llm.common.seals import seal_of
from distill_llm.pipeline.context import DISAGREEMENTS, METRICS
from distill_llm.pipeline.result import stage_records
from distill_llm.pipeline.state import State, read_state, write_state
from distill_llm.recipe.recipe import RECIPE
from distill_llm.report import write_page, write_report

STAGE = "report"


def rewrite_report(run_dir: str | Path) -> Path:
    """Write report.md, its figures and report.html anew. Nothing is loaded, scored or measured.

    Of a run by an earlier version the page has what that version kept.

    Args:
        run_dir: the folder of a run whose report stage is done.

    Returns:
        The path of report.html.

    Raises:
        InputError: the folder is no run's, the run has not come to its report, or another command is using it.
    """
    folder = Path(run_dir)
    state = read_state(folder) if folder.is_dir() else None
    if state is None:
        raise InputError("run_dir", str(run_dir), "the folder of a run")
    if STAGE not in state.stages:
        fix = "let `distill-llm run` go on: this run has no report yet"
        raise InputError("run_dir", str(run_dir), fix=fix)
    with alone_in(folder), full_disk_named(folder):
        return rewrite_finished(folder, state)


def rewrite_finished(folder: Path, state: State) -> Path:
    """As `rewrite_report`, for a folder that nobody else is using and its state, in which the report stage is done."""
    done = {name: result for name, result in state.stages.items() if name in _before(state)}
    metrics = {**stage_records(done), **_read(folder / METRICS, needed=True)}
    recipe = (folder / RECIPE).read_text(encoding="utf-8")
    report = write_report(folder, metrics)
    page = write_page(folder, metrics, _read(folder / DISAGREEMENTS), recipe)
    files = [report, page, *(folder / "figures").glob("*")]
    sealed = {**state.files[STAGE], **seal_of(files, folder)}  # otherwise the next start would find them changed
    write_state(folder, replace(state, files={**state.files, STAGE: sealed}))
    return page


def _before(state: State) -> list[str]:
    """Stages that were done before the report, in order."""
    names = list(state.stages)
    return names[: names.index(STAGE)]


def _read(file: Path, needed: bool = False) -> dict[str, Any]:
    if not needed and not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError("run_dir", str(file), fix="run the recipe again: this file is gone or damaged") from error
    return dict(found)
