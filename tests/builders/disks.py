"""Disks that fail."""

import os

import pytest


def fill_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nothing that is written reaches the disk, and whoever asks is told so."""

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
