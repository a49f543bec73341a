"""Files and folders that are written whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """A path to write to that takes the place of `path` only when the block has ended without error.

    Args:
        path: a file, which is replaced in one step.
        folder: `path` is a folder of our own, which is removed just before the new one takes its place. Without this a
            folder that is there is never removed: an OSError says so.
    """
    partial = path.with_name(path.name + ".partial")
    if folder and partial.is_dir():
        shutil.rmtree(partial)
    partial.unlink(missing_ok=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    if folder and path.is_dir():
        shutil.rmtree(path)
    os.replace(partial, path)
