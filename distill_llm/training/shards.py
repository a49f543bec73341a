"""Generation and clipping where FSDP divides the student's weights among processes."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from transformers import Trainer


@contextmanager
def whole(model: nn.Module) -> Iterator[None]:
    """Inside, each process has all weights of a model that FSDP2 shards, and a forward waits for no other process.

    Without this, generation would gather all weights again for every token. A model that is not sharded stays as it is.
    """
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    # What `set_reshard_after_forward` changes cannot be asked for; parts differ (the last ones keep their weights anyway).
    groups = {group: group.post_forward_mesh_info for part in parts for group in _groups(part)}
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for group, mesh in groups.items():
            group.post_forward_mesh_info = mesh
        for part in parts:
            part.reshard()


def _groups(part: FSDPModule) -> list[Any]:
    state: Any = part._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None)  # one at most before there could be several
    return [group for group in ([state._fsdp_param_group] if found is None else found) if group is not None]


def clip_with(
    norm: torch.Tensor, shards: Iterable[nn.Parameter], copies: Iterable[nn.Parameter], longest: float
) -> torch.Tensor:
    """Clip the gradients of sharded parameters together with those of parameters that every process has whole.

    Args:
        norm: of the shards' gradients, over all processes.
        shards, copies: the parameters.
        longest: what the norm of all is clipped to.

    Returns:
        The norm of all before.
    """
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    own = [parameter.grad for parameter in copies if parameter.grad is not None]
    total = torch.hypot(norm, get_total_norm(own).to(norm)) if own else norm
    factor = (longest / (total + 1e-6)).clamp(max=1.0)
    for gradient in [*own, *(parameter.grad for parameter in shards if parameter.grad is not None)]:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.dtype))
    return total


def sharding_of(trainer: Trainer) -> str | None:
    """What divides a trainer's model among processes; None: nothing."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    fsdp = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    return None if fsdp is None else f"FSDP{fsdp.fsdp_version}"
