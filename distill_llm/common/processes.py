"""The processes of a run, how long they wait for one another, and what their devices lack."""

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

LONGEST_WAIT = 86400
"""Seconds that the other processes wait while the first one prunes."""


def open_processes(cpu: bool = False, backend: str | None = None, seconds: int = LONGEST_WAIT) -> PartialState:
    """The processes that `accelerate launch` started, or the only one; the first call brings them together.

    While process 0 prunes or scores, the others stand at a barrier, which gives up after 10 minutes (NCCL) or 30 (gloo)
    unless it was made with another limit, and TrainingArguments set theirs on a GPU alone. So this is asked first everywhere.

    Args:
        cpu: talk on the CPU; as is done, too, where torch finds no accelerator or `accelerate launch --cpu` says so.
        backend: as of TrainingArguments' `ddp_backend`.
        seconds: most that a process waits; like the others it counts in the first call only.
    """
    cpu = cpu or not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU")
    return PartialState(cpu=cpu, backend=backend, timeout=timedelta(seconds=seconds))


def draw_apart(seed: int) -> None:
    """Seed torch's random numbers of this process, for what each process draws for its own rows: dropout masks.

    The Trainer seeds all processes alike. With the same masks on all of them, the noise of dropout would not average out over
    processes as it does over the rows of one. Process 0, and so a single one, draws as the Trainer seeded it.
    """
    number = PartialState().process_index
    if number:
        torch.manual_seed((seed + number) % 2**32)


def exact_device(device: torch.device) -> torch.device:
    """Where to compute in fp64 for a device: there, or on the CPU for Apple's, which has none."""
    return torch.device("cpu") if device.type == "mps" else device
