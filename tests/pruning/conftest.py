"""Tests of pruning compare with references in fp32, whatever this processor is fastest at."""

import pytest
from builders.pruning import processor_with_bf16


@pytest.fixture(autouse=True)
def fp32(monkeypatch):
    """Products in fp32, unless a test asks for bf16."""
    processor_with_bf16(monkeypatch, False)


@pytest.fixture(scope="module", autouse=True)
def fp32_for_module_fixtures():
    """The same for what a module's fixtures compute."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        processor_with_bf16(monkeypatch, False)
        yield
