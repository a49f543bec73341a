"""Files and folders that are written whole or not at all."""

import os

import pytest

from distill_llm.common.files import written_whole


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
    assert order == [("fsync", number), ("replace", number)]
    assert names(tmp_path / "new") == ["file"] and (tmp_path / "new" / "file").read_text() == "whole"


def test_all_files_of_a_folder_are_on_the_disk_before_it_takes_its_place(tmp_path, order):
    with written_whole(tmp_path / "model", folder=True) as path:
        (path / "code").mkdir(parents=True)
        for name in ("weights", "code/own.py"):
            (path / name).write_text(name)
    inodes = {(tmp_path / "model" / name).stat().st_ino for name in ("weights", "code/own.py")}
    assert {number for kind, number in order[:-1]} == inodes
    assert [kind for kind, _ in order] == ["fsync", "fsync", "replace"]


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
