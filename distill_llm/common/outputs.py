"""What may be written where, found out before any work: nothing of the user's is replaced, and nothing is made yet."""

import errno
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from distill_llm.common.errors import InputError
from distill_llm.common.locks import LOCK

LONGEST_NAME = 200
"""Bytes of a name; systems take 255, and a file that is not whole yet has a longer name (see `written_whole`)."""


def usable_output(folder: Path, field: str = "output_dir", begun: str | Collection[str] | None = None) -> None:
    """Check that a folder may be filled: it is new or empty, or this command began it.

    Args:
        field: what the folder is called in error messages.
        begun: a file that the command writes first, or several; a folder with one of them is one to go on with. None: the
            folder is put in place whole, and is not the working directory.

    Raises:
        InputError: also where the folder cannot be made or written.
    """
    accepted = "a new or empty folder, " + (
        "not the working directory" if begun is None else "or one that the same command began"
    )
    with _in_one_line(field, folder, accepted):
        _check_names(folder)
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(field, str(folder), accepted)
        _writable(folder, field, folder, "a folder")
        first = [] if begun is None else [begun] if isinstance(begun, str) else begun
        if not folder.is_dir() or any((folder / name).is_file() for name in first):
            return
        # A stop at the very start leaves a part or a lock.
        foreign = any(path.suffix != ".partial" and path.name != LOCK for path in folder.iterdir())
        if foreign or (begun is None and folder.samefile(Path.cwd())):
            raise InputError(field, str(folder), accepted)


def usable_file(path: Path, field: str) -> None:
    """Check that a file may be written: it is no folder, and it can be made or changed.

    Raises:
        InputError: naming `field`.
    """
    accepted = "the path of a file that can be written"
    with _in_one_line(field, path, accepted):
        _check_names(path)
        if path.is_dir():
            raise InputError(field, str(path), accepted)
        if not path.exists():
            return _writable(path.parent, field, path, "the path of a file")
        if path.is_file():
            path.open("ab").close()


def usable_statistics(path: Path, field: str) -> None:
    """Check that pruning statistics may be kept in a file, with their record beside it: both are new, or ours already.

    Raises:
        InputError: naming `field`, also for a name that does not end in .safetensors.
    """
    if path.suffix != ".safetensors":
        raise InputError(field, str(path), "a file's path that ends in .safetensors")
    with _in_one_line(field, path, "the path of a file"):
        _check_names(path)
    _writable(path.parent, field, path, "the path of a file")
    for file, is_ours in ((path, _has_statistics), (path.with_suffix(".json"), _is_record)):
        if os.path.lexists(file) and not is_ours(file):
            accepted = f"the path of a new file, or one with pruning statistics ({file.name} holds something else)"
            raise InputError(field, str(path), accepted)


@contextmanager
def _in_one_line(field: str, path: Path, accepted: str) -> Iterator[None]:
    """What the system says of a path (a name that is too long, a folder that may not be read), as one line."""
    try:
        yield
    except OSError as error:
        raise InputError(field, str(path), f"{accepted} ({error.strerror})") from None
    except UnicodeError:
        raise InputError(field, str(path), f"{accepted} (a name that the system can write)") from None


def _check_names(path: Path) -> None:
    """Raise OSError or UnicodeError where no file can have such names: a NUL, a letter that cannot be written, too long."""
    for name in map(os.fsencode, path.parts):
        if b"\0" in name:
            raise OSError(errno.EINVAL, "a NUL in a name")
        if len(name) > LONGEST_NAME:
            raise OSError(errno.ENAMETOOLONG, f"a name of {len(name)} bytes; at most {LONGEST_NAME}")


def nearest(path: Path) -> Path:
    """The path itself, or the nearest above it that exists."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if os.path.lexists(each))


def _writable(folder: Path, field: str, given: Path, kind: str) -> None:
    above = nearest(folder)
    try:
        with tempfile.TemporaryFile(dir=above, suffix=".partial"):  # permissions alone do not tell
            pass
    except OSError:
        raise InputError(field, str(given), f"{kind} that can be written ({above} cannot)") from None


def _has_statistics(file: Path) -> bool:
    try:
        with safe_open(file, "np") as opened:
            return {"examples", "tokens", "has_gradients"} <= (opened.metadata() or {}).keys()
    except (OSError, SafetensorError):
        return False


def _is_record(file: Path) -> bool:
    try:
        record = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and {"model", "rows", "gradients", "moments"} <= record.keys()
