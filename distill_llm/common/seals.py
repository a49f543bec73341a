"""Seals: what files held when they were written or first read, so that a change or damage is noticed later."""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

Seal: TypeAlias = dict[str, list[int | str]]
"""By a file's name within a folder its size in bytes, its time of change in ns, and a hash of its content. Plain JSON."""
TRUSTED = 1 << 26
"""A file above this size (64 MB) is not read again while its size and its time of change are those of the seal."""


def seal_of(files: Iterable[Path], base: Path, known: Mapping[str, list[int | str]] | None = None) -> Seal:
    """The seal of files, about a second per GB that has to be read.

    Args:
        files: those that exist count.
        base: what their names are relative to.
        known: an earlier seal, which saves reading large files that it still fits.
    """
    there = sorted(file for file in files if file.is_file())
    with ThreadPoolExecutor() as threads:  # reading and hashing let other threads run
        stamps = threads.map(lambda file: _stamp(file, (known or {}).get(file.relative_to(base).as_posix())), there)
        return {file.relative_to(base).as_posix(): stamp for file, stamp in zip(there, stamps, strict=True)}


def _stamp(file: Path, known: list[int | str] | None) -> list[int | str]:
    stat = file.stat()
    if known is not None and stat.st_size > TRUSTED and known[:2] == [stat.st_size, stat.st_mtime_ns]:
        return known
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    return [stat.st_size, stat.st_mtime_ns, digest]


def differences(before: Seal, now: Seal) -> dict[str, str]:
    """By name what became of files: `gone`, `changed` or, where the first seal does not have them, `new`."""
    found = {
        name: "gone" if name not in now else "changed"
        for name in before
        if _content(before, name) != _content(now, name)
    }
    return found | {name: "new" for name in now if name not in before}


def broken(seal: Seal, base: Path) -> dict[str, str]:
    """By name the files of a seal that are `gone` or `changed`."""
    return differences(seal, seal_of((base / name for name in seal), base, seal))


def _content(seal: Seal, name: str) -> int | str | None:
    return seal[name][2] if name in seal else None
