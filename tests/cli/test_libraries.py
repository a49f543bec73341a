"""What a command tells libraries holds as long as it runs: a program or test that calls one goes on as before."""

import logging
import os
import warnings

import pytest
from typer.testing import CliRunner

from distill_llm.cli.main import app


def state():
    loggers = [logging.getLogger(name).level for name in ("distill_llm", "bitsandbytes")]
    return dict(os.environ), list(warnings.filters), loggers


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("error", [None, ValueError("a fault of the program")])
def test_a_command_leaves_the_process_as_it_was(monkeypatch, quiet, error):
    met = []

    def command() -> list[str]:
        met.append(state())
        if error is not None:
            raise error
        return []

    for name in ("TRANSFORMERS_VERBOSITY", "TQDM_DISABLE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DATASETS_VERBOSITY", "info")
    monkeypatch.setattr("distill_llm.cli.lists.entries", command)
    before = state()
    result = CliRunner().invoke(app, [*(["--quiet"] if quiet else []), "recipes"])
    assert result.exception is error
    assert state() == before
    ((environment, filters, levels),) = met
    assert environment["TRANSFORMERS_VERBOSITY"] == "error"
    assert environment.get("TQDM_DISABLE") == ("1" if quiet else None)
    assert environment["DATASETS_VERBOSITY"] == ("error" if quiet else "info")
    assert (levels[0] == logging.ERROR) == quiet == (filters != before[1])
