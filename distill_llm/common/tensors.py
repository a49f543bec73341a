"""Files of tensors that a user names."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open

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
