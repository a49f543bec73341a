"""Reading a task's raw rows at the door. Whatever a library raises becomes one line."""

from collections.abc import Iterator
from contextlib import contextmanager

import datasets
from transformers import PreTrainedConfig

from distill_llm.checks.faults import in_one_line
from distill_llm.data.loading import read_task
from distill_llm.data.spec import DataSpec
from distill_llm.data.tasks import TaskData


def open_rows(spec: DataSpec, config: PreTrainedConfig | None, training: bool = True) -> TaskData:
    """Read the rows of a task, as `read_task` does.

    Args:
        spec, config, training: as for `read_task`.

    Raises:
        InputError: a field of the recipe is wrong; it is named.
    """
    with _quiet_datasets(), in_one_line("data.path", spec.path, "data that can be read"):
        return read_task(spec, config, training)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Hide the progress bars of `datasets`, so that a fault stands alone. Downloads from the Hub still show theirs."""
    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
