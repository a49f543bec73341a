"""What the system refuses while a command works: one line with the path. Errors without a path are faults of the program."""

import errno
import os

import pytest
from typer.testing import CliRunner

from distill_llm.cli.main import app


def run_with(error: Exception, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("distill_llm.cli.run.load_recipe", fail)
    return CliRunner().invoke(app, ["run", "quickstart"])


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.EMFILE, errno.EROFS, errno.ESTALE])
def test_an_error_of_a_file_is_one_line_with_its_path(monkeypatch, code):
    result = run_with(OSError(code, os.strerror(code), "runs/x/state.json"), monkeypatch)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: runs/x/state.json: {os.strerror(code)}; ")


def test_other_errors_keep_their_traceback(monkeypatch):
    for error in (OSError("no file"), ValueError("a fault of the program")):
        assert run_with(error, monkeypatch).exception is error
