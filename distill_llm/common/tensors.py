"""Files of tensors that a user names, and what tensors in fewer bits are made of."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from distill_llm.common.errors import InputError, first_line


@contextmanager
def saved_tensors(path: str | os.PathLike, field: str, wanted: str) -> Iterator[Any]:
    """A safetensors file, opened with `safe_open`; whatever it lacks that is read inside the block is one line.

    Args:
        path: the file.
        field: what messages call it.
        wanted: what it should hold.

    Raises:
        InputError: there is no such file, it is damaged, or it holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise InputError(field, str(path), f"{wanted} ({first_line(error)})") from error


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that hold the numbers of one: itself, or those inside one of torchao, which is in fewer bits."""
    if isinstance(tensor, FakeTensor) or not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in parts_of(getattr(tensor, name))]
