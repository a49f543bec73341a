"""A task's raw rows, read at the door: whatever a library raises about them is one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers import PreTrainedConfig

from distill_llm.checks.faults import in_one_line
from distill_llm.data.loading import load_task
from distill_llm.data.spec import DataSpec
from distill_llm.data.tasks import TaskData


def open_rows(spec: DataSpec, config: PreTrainedConfig | None, training: bool = True) -> TaskData:
    """Read the rows of a task, as `load_task` does.

    Args:
        spec, config, training: as of `load_task`.

    Raises:
        InputError: names a field of a recipe.
    """
    with _quiet_datasets(), in_one_line("data.path", spec.path, "data that can be read"):
        return load_task(spec, config, training)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets`, so that a fault stands alone (downloads from the Hub still show theirs)."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
