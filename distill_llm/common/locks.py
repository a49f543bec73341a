"""One at a time: a lock that the system gives back when its holder ends, however it ends."""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from distill_llm.common.errors import InputError
from distill_llm.common.files import full_disk_named

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
_PAUSE = 0.1
_mine: set[Path] = set()
"""What this process holds: the system's locks do not keep a process out of what it holds itself."""


@contextmanager
def held(file: Path, field: str, given: Path, seconds: float = 0) -> Iterator[None]:
    """Hold a lock while the block runs.

    The file says who holds it; it is removed afterwards, and so is a folder that was made for it and is still empty. A file
    that a killed process left is no lock.

    Args:
        file: the lock's, made with its folder where it is not there.
        field, given: what the lock is on, for the message.
        seconds: how long to wait for another holder.

    Raises:
        InputError: another one holds it.
    """
    with full_disk_named(file):
        is_made = not file.parent.is_dir()
        file.parent.mkdir(parents=True, exist_ok=True)
        file = file.resolve()
        until = time.monotonic() + seconds
        while (descriptor := _taken(file)) is None:
            if time.monotonic() >= until:
                fix = f"wait until it ends, or name another: {_holder(file)} is using it"
                raise InputError(field, str(given), fix=fix)
            time.sleep(_PAUSE)
    _mine.add(file)
    try:
        with full_disk_named(file):
            os.truncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        file.unlink(missing_ok=True)  # before it is given back: who opened it meanwhile sees that it has no name
        _mine.discard(file)
        os.close(descriptor)
        if is_made:
            with suppress(OSError):
                file.parent.rmdir()


def _taken(file: Path) -> int | None:
    """A descriptor with the lock; None where another has it."""
    if file in _mine:
        return None
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        if fcntl is not None:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(descriptor).st_nlink:
            return descriptor
    except (BlockingIOError, PermissionError):
        pass
    os.close(descriptor)
    return None


def _holder(file: Path) -> str:
    if file in _mine:
        return "this process"
    try:
        return file.read_text().strip() or "another process"
    except OSError:
        return "another process"


@contextmanager
def alone_in(folder: Path, field: str = "output_dir") -> Iterator[None]:
    """Keep other commands out of a folder while the block runs. The processes of one `accelerate launch` are one holder.

    What a check of the folder said before may be different by now: check again inside. The folder may be replaced as a whole.

    Args:
        field: what the folder is called in error messages.

    Raises:
        InputError: on all processes, where another command is at work there.
    """
    from accelerate.utils import broadcast_object_list

    from distill_llm.common.processes import open_processes

    fault: list[tuple[str, str, str] | None] = [None]
    with ExitStack() as stack:
        if open_processes().is_main_process:
            try:
                stack.enter_context(held(folder / LOCK, field, folder))
            except InputError as error:
                fault = [(error.field, error.given, error.fix)]
        if (found := broadcast_object_list(fault)[0]) is not None:
            raise InputError(found[0], found[1], fix=found[2])
        yield
