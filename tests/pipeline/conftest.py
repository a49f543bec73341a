"""A teacher, rows, and one run that is done and that no test changes."""

from pathlib import Path

import pytest
from builders.recipes import write_model
from builders.runs import two_rounds, write_learnable_rows

import distill_llm


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with a teacher and rows."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_model(folder / "teacher", max_position_embeddings=64)
    write_learnable_rows(folder / "rows.csv")
    return folder


@pytest.fixture(scope="session")
def finished(inputs) -> distill_llm.RunResult:
    """An uninterrupted run."""
    return distill_llm.run(two_rounds(inputs), inputs / "uninterrupted")
