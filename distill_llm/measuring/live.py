"""Which storages are alive while operations run, followed one by one: exact, and independent of any allocator."""

import weakref
from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class LiveStorages(TorchDispatchMode):
    """Follows the storages that operations create, except those of `known` tensors.

    Attributes:
        now, peak: bytes alive now, and the most at once.
        events: (number of a storage, bytes) of each that came, with minus for each that went.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self.events: list[tuple[int, int]] = []
        self.seen = WeakIdKeyDictionary({tensor.untyped_storage(): -1 for tensor in known})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def number(self, tensor: torch.Tensor) -> int:
        """The number of a tensor's storage among those that came; -1 of a known one."""
        return self.seen.get(tensor.untyped_storage(), -1)

    def peak_without(self, numbers: Collection[int]) -> int:
        """The most bytes alive at once, had the storages of these numbers not been there."""
        now = peak = 0
        for number, size in self.events:
            now += 0 if number in numbers else size
            peak = max(peak, now)
        return peak

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.seen:
            size, number = storage.nbytes(), len(self.events)
            self.seen[storage] = number
            self._count(number, size)
            weakref.finalize(storage, self._count, number, -size)

    def _count(self, number: int, size: int) -> None:
        self.now += size
        self.events.append((number, size))
