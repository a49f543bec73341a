"""Statistics on several processes: each takes its part of the calibration batches, and their sums are added up."""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def process() -> tuple[int, int]:
    """This process's number, and how many processes there are; (0, 1) where torch.distributed does not run."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def sum_over_processes(tensors: Sequence[torch.Tensor]) -> None:
    """Add up each tensor over all processes, in place and in fp64. One process alone keeps what it has.

    All processes give tensors of the same shapes in the same order.
    """
    if process()[1] == 1:
        return
    backend = dist.get_backend()
    device = torch.device("cuda", torch.cuda.current_device()) if "nccl" in backend else torch.device("cpu")
    for tensor in tensors:
        exact = tensor.to(device, torch.float64)
        dist.all_reduce(exact)
        tensor.copy_(exact)


def from_main_process(value: T | None) -> T:
    """What process 0 has, on every process."""
    if process()[1] == 1:
        return value  # type: ignore[return-value]
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]  # type: ignore[return-value]
