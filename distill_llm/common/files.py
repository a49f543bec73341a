"""Files and folders that are written whole or not at all."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when the block ends without an error.

    What was written reaches the disk before it takes that place, so a machine that stops leaves the old or the new, never a
    part. After an error nothing is left.

    Args:
        path: a file, which is replaced in one step, or a new folder. Several processes may write the same one: of files the
            last counts; of folders the first, and the others get an OSError.
        folder: `path` is a folder of our own, written by one process, and removed just before the new one takes its
            place. Without this a folder that is there is never removed: an OSError says so.
    """
    partial = path.with_name(f"{path.name}.partial" if folder else f"{path.name}.{uuid.uuid4().hex}.partial")
    _remove(partial)  # a folder that a killed process left
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield partial
        for written in [partial, *partial.rglob("*")]:
            if written.is_file():
                _to_disk(written)
        if folder and path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    except BaseException:
        _remove(partial)
        raise


def _to_disk(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
