"""Files and folders that are written whole or not at all, and what is said when a disk is full."""

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distill_llm.common.errors import InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""No room on the device, no quota left, a file larger than may be written."""
_TORCH = re.compile("PytorchStreamWriter|inline_container|iostream error")
"""Words of torch.save when it cannot write, which keep no number."""


@contextmanager
def written_whole(path: Path, folder: bool = False) -> Iterator[Path]:
    """A path to write to that takes the place of `path` when the block ends without an error.

    What was written reaches the disk before it takes that place, and the swap reaches the disk before the block is left: a
    machine that stops leaves the old or the new (of a folder that is replaced, the new or none), never a part. After an error
    nothing is left.

    Args:
        path: a file, which is replaced in one step, or a new folder. Several processes may write the same one: of files the
            last counts; of folders the first, and the others get an OSError.
        folder: `path` is a folder of our own, written by one process, and removed just before the new one takes its
            place. Without this a folder that is there is never removed: an OSError says so.

    Raises:
        InputError: naming `path`, where the disk is full.
    """
    partial = path.with_name(f"{path.name}.partial" if folder else f"{path.name}.{uuid.uuid4().hex}.partial")
    with full_disk_named(path):
        _remove(partial)  # a folder that a killed process left
        partial.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            to_disk(partial)
            if folder and path.is_dir():
                shutil.rmtree(path)
            os.replace(partial, path)
            _sync(path.parent)
        except BaseException:
            _remove(partial)
            raise


def remove_parts(folder: Path) -> None:
    """Remove what killed processes had not finished below a folder that nobody else is writing in."""
    for partial in list(folder.rglob("*.partial")):
        _remove(partial)


def to_disk(path: Path) -> None:
    """Wait until a file, or all files and folders of a folder, are on the disk."""
    for each in [*path.rglob("*"), path]:
        _sync(each)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Turn the many errors of a full disk into one line.

    Args:
        path: what the block writes.

    Raises:
        InputError: naming `path`.
    """
    try:
        yield
    except Exception as error:
        if (reason := _why_full(error)) is None:
            raise
        raise InputError("disk", str(path), fix=f"make room, then run the same command again: {reason}") from error


def _why_full(error: BaseException | None) -> str | None:
    """In words, that a disk is full; None where that is not what went wrong."""
    while error is not None and not isinstance(error, InputError):
        if isinstance(error, OSError) and error.errno in _FULL:
            return os.strerror(error.errno)
        text = str(error)
        for words in map(os.strerror, _FULL):
            if words in text:  # of Rust (safetensors, tokenizers), and of torch's shared memory
                return words
        if isinstance(error, RuntimeError) and _TORCH.search(text):
            return os.strerror(errno.ENOSPC)
        error = error.__cause__ or error.__context__
    return None


def _sync(path: Path) -> None:
    if path.is_dir():
        if os.name == "nt":  # Windows opens no folders
            return
        descriptor = os.open(path, os.O_RDONLY)
    else:
        descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def linked_or_copied(source: str, target: str) -> None:
    """A file once more: the same one where the disk has links, else a copy. For files that are replaced whole, never changed."""
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copy2(source, target)
