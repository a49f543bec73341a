"""Weights that two models have in common: training the one would change the other."""

import torch
from torch import nn

from distill_llm.common.errors import InputError

SHOWN = 3
"""Names that a message lists."""
STEADY = (nn.Embedding, nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Identity)
"""Kinds of modules that do the same in training as in evaluation."""


def check_apart(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student whose training would change its frozen teacher.

    Memory is compared, not names or objects: a view of the teacher's weight is the teacher's weight. Frozen parameters may be
    the same memory (under adapters the base may be the teacher's own weights), and so may modules that hold nothing else.

    Raises:
        InputError: a trained parameter, a buffer, or a module with a mode for training is in both models.
    """
    theirs = {place for tensor in _tensors(teacher).values() if (place := _place(tensor)) is not None}
    changing = {
        name: tensor
        for name, tensor in _tensors(student).items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }
    names = [name for name, tensor in changing.items() if _place(tensor) in theirs]
    if not names:
        modules = set(teacher.modules())
        names = [name for name, module in student.named_modules() if module in modules and type(module) not in STEADY]
    if student is teacher:
        raise InputError("teacher", "the student itself", fix="give another model, such as a copy of it")
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        fix = "copy these before the student gets them (copy.deepcopy): they are the teacher's own, and training changes them"
        raise InputError("model", ", ".join(names[:SHOWN]) + more, fix=fix)


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def _place(tensor: torch.Tensor) -> tuple[torch.device, int] | None:
    """Where a tensor's memory begins; None of one without memory of its own to look at."""
    try:
        pointer = tensor.untyped_storage().data_ptr() if tensor.numel() else 0
    except (NotImplementedError, RuntimeError):  # meta, or a subclass that holds its values elsewhere
        return None
    return (tensor.device, pointer) if pointer else None
