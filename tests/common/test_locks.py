"""Locks: one holder at a time, and none after its process has ended."""

import os
import signal
import time

import pytest

from distill_llm.common.errors import InputError
from distill_llm.common.files import written_whole
from distill_llm.common.locks import alone_in, held


def holder_in_another_process(file) -> int:
    """The number of a process that holds a lock until it is killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        with held(file, "field", file):
            os.write(writing, b"x")
            time.sleep(60)
        os._exit(0)
    os.read(reading, 1)
    os.close(reading)
    os.close(writing)
    return child


def test_a_second_holder_is_refused_in_one_line_and_a_killed_one_holds_nothing(tmp_path):
    file = tmp_path / "run" / ".lock"
    child = holder_in_another_process(file)
    with pytest.raises(InputError) as caught, held(file, "output_dir", tmp_path / "run"):
        pass
    line = f"output_dir: got {str(tmp_path / 'run')!r}; wait until it ends, or name another: process {child} on "
    assert str(caught.value).startswith(line) and "\n" not in str(caught.value)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert file.is_file(), "it is left behind"
    with held(file, "output_dir", tmp_path / "run"):
        assert file.read_text().startswith(f"process {os.getpid()} on ")
    assert not file.exists()


def test_a_process_keeps_itself_out(tmp_path):
    with held(tmp_path / "lock", "field", tmp_path):
        with pytest.raises(InputError, match="this process is using it"), held(tmp_path / "lock", "field", tmp_path):
            pass
        assert (tmp_path / "lock").is_file()
    with held(tmp_path / "lock", "field", tmp_path):
        pass


def test_who_waits_gets_the_lock_when_it_is_free(tmp_path):
    child = holder_in_another_process(tmp_path / "lock")
    os.kill(child, signal.SIGKILL)
    with held(tmp_path / "lock", "field", tmp_path, seconds=60):
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    os.waitpid(child, 0)


def test_a_lock_whose_file_was_removed_by_its_last_holder_is_not_taken_for_the_new_one(tmp_path, monkeypatch):
    """Opened before the holder removed it, locked after: such a lock has no name, and another may hold the name."""
    file, opened = tmp_path / "lock", os.open

    def open_then_lose(path, *rest):
        descriptor = opened(path, *rest)
        monkeypatch.setattr(os, "open", opened)
        file.unlink()
        return descriptor

    monkeypatch.setattr(os, "open", open_then_lose)
    with pytest.raises(InputError), held(file, "field", file):
        pass


def test_nothing_is_left_of_a_lock_and_what_was_refused_leaves_no_folder(tmp_path):
    folder = tmp_path / "new"
    with alone_in(folder):
        assert len([*tmp_path.rglob("*.lock")]) == 1
    assert list(tmp_path.iterdir()) == []
    with alone_in(folder):
        (folder / "kept").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "kept"]
    with alone_in(folder), written_whole(folder, folder=True) as path:
        path.mkdir()
        (path / "other").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "other"]
