"""Disks that fail."""

import errno
import os

import pytest


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing that is written reaches the disk, and whoever asks is told so."""

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
