"""Files and folders that are written whole or not at all."""

import errno
import os
import resource
import signal

import pytest
import torch
from safetensors.torch import save_file

from distill_llm.common.errors import InputError
from distill_llm.common.files import full_disk_named, written_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def order(monkeypatch):
    """What reached the disk and what was put in its place, in this order."""
    found, fsync, replace = [], os.fsync, os.replace

    def noting_fsync(descriptor):
        found.append(("fsync", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noting_replace(source, target):
        found.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    return found


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, order):
    with written_whole(tmp_path / "new" / "file") as path:
        path.write_text("whole")
        assert names(path.parent) == [path.name] and path.suffix == ".partial"
    number = (tmp_path / "new" / "file").stat().st_ino
    above = (tmp_path / "new").stat().st_ino
    assert order == [("fsync", number), ("replace", number), ("fsync", above)], "the swap is on the disk, too"
    assert names(tmp_path / "new") == ["file"] and (tmp_path / "new" / "file").read_text() == "whole"


def test_all_files_of_a_folder_are_on_the_disk_before_it_takes_its_place(tmp_path, order):
    with written_whole(tmp_path / "model", folder=True) as path:
        (path / "code").mkdir(parents=True)
        for name in ("weights", "code/own.py"):
            (path / name).write_text(name)
    inodes = {(tmp_path / "model" / name).stat().st_ino for name in ("weights", "code/own.py")}
    folders = {(tmp_path / name).stat().st_ino for name in ("model", "model/code")}
    assert {number for kind, number in order[:-2]} == inodes | folders
    assert [kind for kind, _ in order] == ["fsync"] * 4 + ["replace", "fsync"]
    assert order[-1][1] == tmp_path.stat().st_ino


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there_and_nothing_else(tmp_path, folder):
    def write(path, text):
        if folder:
            path.mkdir()
        (path / "inside" if folder else path).write_text(text)

    with written_whole(tmp_path / "it", folder=folder) as path:
        write(path, "old")
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "it", folder=folder) as path:
        write(path, "ne")
        raise KeyboardInterrupt
    kept = tmp_path / "it" / "inside" if folder else tmp_path / "it"
    assert names(tmp_path) == ["it"] and kept.read_text() == "old"


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with written_whole(tmp_path / "it") as first, written_whole(tmp_path / "it") as second:
        first.write_text("first")
        second.write_text("second")
    assert names(tmp_path) == ["it"] and (tmp_path / "it").read_text() == "first"  # whose block ended last


def test_a_folder_that_a_killed_process_left_is_cleared(tmp_path):
    (tmp_path / "it.partial").mkdir()
    (tmp_path / "it.partial" / "half").write_text("")
    with written_whole(tmp_path / "it", folder=True) as path:
        path.mkdir()
        (path / "whole").write_text("")
    assert names(tmp_path) == ["it"] and names(tmp_path / "it") == ["whole"]


WRITERS = {
    "python": lambda path: path.write_bytes(bytes(1 << 20)),
    "torch": lambda path: torch.save(torch.zeros(1 << 18), path),
    "safetensors": lambda path: save_file({"x": torch.zeros(1 << 18)}, path),
}


@pytest.fixture
def small_disk():
    """A process whose files may not be larger than 64 KB, as on a disk that is nearly full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_that_fills_up_is_one_line_with_the_path_and_leaves_nothing(tmp_path, small_disk, writer):
    (tmp_path / "it").write_text("before")
    with pytest.raises(InputError) as caught, written_whole(tmp_path / "it") as path:
        WRITERS[writer](path)
    assert str(caught.value).startswith(
        f"disk: got {str(tmp_path / 'it')!r}; make room, then run the same command again: "
    )
    assert names(tmp_path) == ["it"] and (tmp_path / "it").read_text() == "before"


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EACCES, "denied"), RuntimeError("wrong"), InputError("a", 1, "2")):
        with pytest.raises(type(error)) as caught, full_disk_named(tmp_path):
            raise error
        assert caught.value is error


def test_full_shared_memory_is_a_full_disk(tmp_path):
    with pytest.raises(InputError, match="File too large$"), full_disk_named(tmp_path):
        raise RuntimeError("unable to resize file </torch_1_2_3> to the right size: File too large (27)")


def test_a_full_disk_behind_another_error_is_found(tmp_path):
    with pytest.raises(InputError, match="No space left"), full_disk_named(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "x")
        except OSError as error:
            raise RuntimeError("a library's own words") from error
