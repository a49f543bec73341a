"""The order of training examples: the same global batches for any number of processes, and after a resume."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class GlobalBatchSampler(Sampler[int]):
    """Shuffled indices, a whole number of global batches; the order depends on size, seed and epoch alone.

    The last global batch is filled with the latest examples of the batches before it, so that every process gets as many.

    Args:
        size: number of examples.
        batch_size: of a global batch: all processes and accumulated micro-batches together.
        seed: of the order.
        epoch: tells the current epoch when an iteration starts.
        lengths: number of tokens of each example, to put similar ones into the same batch; None shuffles freely.
        drop_last: leave the incomplete global batch out instead of filling it up.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int],
        lengths: Sequence[int] | None = None,
        drop_last: bool = False,
    ):
        self.size, self.batch_size, self.seed, self.epoch, self.lengths = size, batch_size, seed, epoch, lengths
        self.whole = size - size % batch_size
        self.total = self.whole if drop_last or self.whole == size else self.whole + batch_size

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch())
        if self.lengths is None:
            indices = torch.randperm(self.size, generator=generator).tolist()
        else:
            indices = get_length_grouped_indices(self.lengths, self.batch_size, generator=generator)
        filler = islice(cycle(reversed(indices[: self.whole] or indices)), max(0, self.total - self.size))
        yield from [*indices, *filler][: self.total]


def lengths_of(data: Any, column: str) -> list[int]:
    """The number of tokens of every row of a data set, by its column of lengths where it has one."""
    names = getattr(data, "column_names", None) or ()
    if column in names:
        return list(data[column])
    return [len(ids) for ids in data["input_ids"]] if names else [len(row["input_ids"]) for row in data]
