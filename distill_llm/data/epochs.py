"""The number of the current epoch, where batches are made: in this process or in workers of a data loader."""

import torch


class Epoch:
    """A number in shared memory: workers that started before it changes see the new one.

    A data loader hands out no batch of an epoch before that epoch begins, so it is enough to set the number then.
    """

    def __init__(self) -> None:
        self._shared = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def number(self) -> int:
        """Counted from 0."""
        return int(self._shared)

    @number.setter
    def number(self, number: int) -> None:
        self._shared.fill_(number)
