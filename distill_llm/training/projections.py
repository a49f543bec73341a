"""The projections of hidden states in a training: they learn with the student, in a parameter group of their own.

Every process has them whole, also where the student is sharded: the code that wraps, shards and saves the student's
parameters never sees them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

PROJECTIONS_NAME = "projections.pt"


def join(optimizer: Optimizer, projections: nn.Module, weight_decay: float) -> None:
    """Add the projections to the optimizer, once, as its last group.

    Under FSDP2 they join after the student was sharded: its parameters are looked up in the optimizer then.
    """
    parameters, last = list(projections.parameters()), optimizer.param_groups[-1]["params"]
    if parameters and not (last and last[0] is parameters[0]):  # of adapters the last group may be empty
        optimizer.add_param_group({"params": parameters, "weight_decay": weight_decay})


@contextmanager
def apart(optimizer: Optimizer, projections: nn.Module) -> Iterator[None]:
    """Inside, the optimizer is that of the student alone, to be saved or loaded; the projections come back afterwards."""
    parameters = list(projections.parameters())
    if not parameters:
        yield
        return
    group = optimizer.param_groups.pop()
    states: dict[torch.Tensor, Any] = {
        parameter: optimizer.state.pop(parameter) for parameter in parameters if parameter in optimizer.state
    }
    try:
        yield
    finally:
        optimizer.param_groups.append(group)
        optimizer.state.update(states)


def save(optimizer: Optimizer, projections: nn.Module, folder: str) -> None:
    """Write weights and the optimizer's state of the projections."""
    group = {name: value for name, value in optimizer.param_groups[-1].items() if name != "params"}
    states = [optimizer.state.get(parameter) for parameter in projections.parameters()]
    content = {"weights": projections.state_dict(), "group": group, "states": states}
    torch.save(content, os.path.join(folder, PROJECTIONS_NAME))


def load(optimizer: Optimizer, projections: nn.Module, folder: str) -> None:
    """Read what `save` wrote, onto the devices that the projections are on."""
    parameters = list(projections.parameters())

    def place(storage: Any, location: str) -> Any:
        target = location if location == "cpu" else str(parameters[0].device)  # step counts stay on the CPU
        return torch.serialization.default_restore_location(storage, target)

    content = torch.load(os.path.join(folder, PROJECTIONS_NAME), map_location=place, weights_only=True)
    projections.load_state_dict(content["weights"])
    optimizer.param_groups[-1].update(content["group"])
    states = zip(parameters, content["states"], strict=True)
    optimizer.state.update({parameter: state for parameter, state in states if state is not None})
