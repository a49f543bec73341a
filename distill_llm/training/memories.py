"""What terms keep from step to step, in the course of a training: changed after every step, saved and read again."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import TrainerCallback

from distill_llm.common.errors import InputError
from distill_llm.losses.memory import Memory
from distill_llm.training.step_sums import StepSums

MEMORIES_NAME = "terms.pt"


class StepEnds(TrainerCallback):
    """Lets the memories of terms change after every optimizer step that counts.

    Args:
        memories: by term.
        sums: which steps count.
    """

    def __init__(self, memories: nn.ModuleDict, sums: StepSums):
        self.memories, self.sums = memories, sums

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What is left of a step that never ended does not count."""
        for memory in self.memories.values():
            cast(Memory, memory).drop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Before the log, evaluation and checkpoint of the step."""
        for memory in self.memories.values():
            if self.sums.in_a_row:  # skipped, as it was not finite
                cast(Memory, memory).drop()
            else:
                cast(Memory, memory).end_step()


def save(memories: nn.ModuleDict, folder: str) -> None:
    """Write the memories, if there are any."""
    if len(memories):
        torch.save(memories.state_dict(), Path(folder) / MEMORIES_NAME)


def load(memories: nn.ModuleDict, folder: str) -> None:
    """Go on from what `save` wrote.

    Raises:
        InputError: the checkpoint has none, or those of other terms or sizes.
    """
    if not len(memories):
        return
    path, names = Path(folder) / MEMORIES_NAME, ", ".join(memories)
    if not path.is_file():
        fix = f"resume from a checkpoint of a training with {names}: {MEMORIES_NAME} is missing"
        raise InputError("resume_from_checkpoint", str(folder), fix=fix)
    found, own = torch.load(path, map_location="cpu", weights_only=True), memories.state_dict()
    if {name: each.shape for name, each in found.items()} != {name: each.shape for name, each in own.items()}:
        fix = f"resume with the losses of that training: {MEMORIES_NAME} has other terms than {names}, or other sizes of them"
        raise InputError("resume_from_checkpoint", str(folder), fix=fix)
    memories.load_state_dict(found)
