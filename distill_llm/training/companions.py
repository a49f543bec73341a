"""What learns with the student and is no part of it: projections, peers, masks. In parameter groups of their own.

Every process has them whole, also where the student is sharded: the code that wraps, shards and saves the student's
parameters never sees them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distill_llm.common.errors import InputError

PROJECTIONS_NAME = "projections.pt"


@dataclass(frozen=True)
class Companion:
    """A module that learns with the student.

    Attributes:
        file: of its weights and the optimizer's state in a checkpoint.
        module: whose trained parameters are meant.
        undecayed: names of parameters without weight decay.
        alone: whether its gradients are clipped by themselves, as those of a model of its own, or with the student's.
        what: what messages call it.
        learning_rate: its own; None: the student's.
    """

    file: str
    module: nn.Module
    undecayed: frozenset[str] = frozenset()
    alone: bool = False
    what: str = "the projections of hidden states"
    learning_rate: float | None = None

    @property
    def groups(self) -> list[list[nn.Parameter]]:
        """Its parameters with weight decay, and those without; none that is empty."""
        named = [(name, each) for name, each in self.module.named_parameters() if each.requires_grad]
        parts = [[each for name, each in named if (name in self.undecayed) == without] for without in (False, True)]
        return [part for part in parts if part]

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, in the order of the groups."""
        return [each for group in self.groups for each in group]

    @property
    def gradients(self) -> list[torch.Tensor]:
        """Those that there are."""
        return [each.grad for each in self.parameters if each.grad is not None]


def join(optimizer: Optimizer, companions: Sequence[Companion], weight_decay: float) -> None:
    """Add companions to the optimizer, once, as its last groups.

    Under FSDP2 they join after the student was sharded: its parameters are looked up in the optimizer then.
    """
    there = {id(each) for group in optimizer.param_groups for each in group["params"]}
    for companion in companions:
        decayed = {id(each) for name, each in companion.module.named_parameters() if name not in companion.undecayed}
        for group in companion.groups:
            if id(group[0]) not in there:
                decay = weight_decay if id(group[0]) in decayed else 0.0
                rate = {} if companion.learning_rate is None else {"lr": companion.learning_rate}
                optimizer.add_param_group({"params": group, "weight_decay": decay, **rate})


@contextmanager
def apart(optimizer: Optimizer, companions: Sequence[Companion]) -> Iterator[None]:
    """Inside, the optimizer is that of the student alone, to be saved or loaded; companions come back afterwards."""
    parameters = [each for companion in companions for each in companion.parameters]
    number = sum(len(companion.groups) for companion in companions)
    groups = optimizer.param_groups[len(optimizer.param_groups) - number :]
    del optimizer.param_groups[len(optimizer.param_groups) - number :]
    states: dict[torch.Tensor, Any] = {
        parameter: optimizer.state.pop(parameter) for parameter in parameters if parameter in optimizer.state
    }
    try:
        yield
    finally:
        optimizer.param_groups.extend(groups)
        optimizer.state.update(states)


def save(optimizer: Optimizer, companion: Companion, folder: str) -> None:
    """Write weights and the optimizer's groups and states of a companion that has parameters."""
    groups = [
        {name: value for name, value in each.items() if name != "params"} for each in groups_of(optimizer, companion)
    ]
    states = [optimizer.state.get(parameter) for parameter in companion.parameters]
    content = {"weights": companion.module.state_dict(), "groups": groups, "states": states}
    torch.save(content, Path(folder) / companion.file)


def load(optimizer: Optimizer, companion: Companion, folder: str) -> None:
    """Read what `save` wrote, onto the device that the companion is on.

    Raises:
        InputError: the checkpoint has none, or those of other layers or sizes.
    """
    parameters, path = companion.parameters, Path(folder) / companion.file
    if not path.is_file():
        fix = f"resume from a checkpoint of a training with the same losses and models: {companion.file} is missing"
        raise InputError("resume_from_checkpoint", str(folder), fix=fix)

    def place(storage: Any, location: str) -> Any:
        target = location if location == "cpu" else str(parameters[0].device)  # step counts stay on the CPU
        return torch.serialization.default_restore_location(storage, target)

    content, own = torch.load(path, map_location=place, weights_only=True), companion.module.state_dict()
    if {name: each.shape for name, each in content["weights"].items()} != {
        name: each.shape for name, each in own.items()
    }:
        fix = f"resume with the losses and models of that training: {companion.file} has other layers, or other sizes of them"
        raise InputError("resume_from_checkpoint", str(folder), fix=fix)
    companion.module.load_state_dict(content["weights"])
    for group, kept in zip(groups_of(optimizer, companion), content["groups"], strict=True):
        group.update(kept)
    states = zip(parameters, content["states"], strict=True)
    optimizer.state.update({parameter: state for parameter, state in states if state is not None})


def groups_of(optimizer: Optimizer, companion: Companion) -> list[dict[str, Any]]:
    """The optimizer's groups of a companion."""
    first = {id(group[0]) for group in companion.groups}
    return [group for group in optimizer.param_groups if group["params"] and id(group["params"][0]) in first]
