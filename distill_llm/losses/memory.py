"""What a term keeps from one optimizer step to the next: buffers that are the same on all processes and in every checkpoint."""

import torch
from torch import distributed, nn

from distill_llm.losses.examples import gathered_rows

UNKNOWN = 0
"""The key of a text that is not known."""


class Memory(nn.Module):
    """The state of a term. Its buffers are the state; a subclass says in `advance` how a step changes them.

    A term reads the buffers in `sum` and hands rows of each micro-batch to `keep`. The buffers change once, at the end of an
    optimizer step, by the rows of the whole accumulated batch of all processes in the order of that batch. So neither
    micro-batches nor processes change what a step is.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[torch.Tensor, ...]] = []

    def keep(self, *columns: torch.Tensor) -> None:
        """Rows of a micro-batch, (B, ...) each, for `advance`."""
        self._kept.append(tuple(column.detach() for column in columns))

    def drop(self) -> None:
        """Forget the rows that were kept: their step does not count."""
        self._kept = []

    def end_step(self) -> None:
        """Change the buffers; all processes call it together. Of several processes the device is waited for."""
        kept, self._kept = self._kept, []
        if kept:
            with torch.no_grad():
                self.advance(*(torch.cat(parts) for parts in zip(*in_order(kept), strict=True)))

    def advance(self, *columns: torch.Tensor) -> None:
        """Change the buffers by all rows of a step, (E, ...) each, in the order of the global batch."""
        raise NotImplementedError


def in_order(batches: list[tuple[torch.Tensor, ...]]) -> list[tuple[torch.Tensor, ...]]:
    """The micro-batches of all processes, who take turns; every process has as many, of any number of rows.

    Args:
        batches: of this process, by micro-batch the columns.
    """
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if processes == 1:
        return batches
    sizes = torch.tensor([len(columns[0]) for columns in batches], device=batches[0][0].device)
    split = [each.tolist() for each in gathered_rows(sizes, processes)]
    columns = [gathered_rows(torch.cat(parts), processes) for parts in zip(*batches, strict=True)]
    found = [[each.split(size) for each, size in zip(column, split, strict=True)] for column in columns]
    turns = [(number, process) for number in range(len(batches)) for process in range(processes)]
    return [tuple(column[process][number] for column in found) for number, process in turns]


def text_keys(tokens: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
    """(B,) a number of each text, the same wherever it comes again and whatever its padding; UNKNOWN without tokens.

    Args:
        tokens: (B, T) token ids.
        valid: (B, T), 1 at valid tokens.
    """
    if tokens is None:
        return torch.full((len(valid),), UNKNOWN, dtype=torch.long, device=valid.device)
    places = valid.long().cumsum(1)
    mixed = (tokens.long() + 1) * 0x9E3779B97F4A7C1 + places * 0x3C6EF372FE94F82B  # products wrap around
    for shift, factor in ((31, 0x5851F42D4C957F2D), (29, 0x14057B7EF767814F)):
        mixed = (mixed ^ (mixed >> shift)) * factor
    keys = ((mixed ^ (mixed >> 32)) * valid.long()).sum(1)
    return torch.where(keys == UNKNOWN, UNKNOWN + 1, keys)


class Queues(Memory):
    """The latest embeddings of the teacher, by layer pair, at unit length; and what they are of.

    Args:
        size: K, the largest number of them.
        pairs, width: L layer pairs, H channels.

    Attributes:
        vectors: (L, K, H).
        keys, labels: (K,) of the texts that they are of, see `text_keys`; labels are below 0 where they are not known.
        count: how many came in, in all.
        level: (L,) the logarithm of the mean of exp(similarity / temperature) between the student's embeddings of a step and
            those of other texts in the queue: of the first step that has such a pair, nan before it.
    """

    vectors: torch.Tensor
    keys: torch.Tensor
    labels: torch.Tensor
    count: torch.Tensor
    level: torch.Tensor

    def __init__(self, size: int, pairs: int, width: int, temperature: float):
        super().__init__()
        self.temperature = temperature
        self.register_buffer("vectors", torch.zeros(pairs, size, width))
        self.register_buffer("keys", torch.full((size,), UNKNOWN))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("level", torch.full((pairs,), torch.nan))

    def others(self, keys: torch.Tensor) -> torch.Tensor:
        """(B, K) of bool: the embeddings in the queue that are of another text than that of a row."""
        filled = torch.arange(len(self.keys), device=keys.device) < self.count
        return filled & ((self.keys != keys[:, None]) | (keys[:, None] == UNKNOWN))

    def advance(self, *columns: torch.Tensor) -> None:
        """Put the teacher's embeddings in, in the place of the oldest.

        Args:
            columns: the student's and the teacher's embeddings, (E, L, H); keys and labels, (E,).
        """
        student, teacher, keys, labels = columns
        size = len(self.keys)
        last = slice(max(0, len(teacher) - size), None)
        places = (self.count + torch.arange(len(teacher), device=teacher.device)[last]) % size
        self.vectors[:, places] = teacher[last].transpose(0, 1)
        self.keys[places], self.labels[places] = keys[last], labels[last]
        self.count += len(teacher)
        self._set_level(student, keys)

    def _set_level(self, student: torch.Tensor, keys: torch.Tensor) -> None:
        if self.level.isfinite().all():  # a wait for the device, but only once a step
            return
        others = self.others(keys)
        scaled = torch.einsum("elh,lkh->lek", student, self.vectors) / self.temperature
        found = scaled.masked_fill(~others, -torch.inf).flatten(1).logsumexp(1) - others.sum().log()
        self.level.copy_(torch.where(self.level.isfinite(), self.level, found))


class Centres(Memory):
    """A centre of each class, by layer pair: a moving average of the teacher's embeddings at unit length.

    Attributes:
        centres: (L, C, H); zeros of a class that was not seen.
        seen: (C,) of bool.
    """

    centres: torch.Tensor
    seen: torch.Tensor

    def __init__(self, pairs: int, classes: int, width: int):
        super().__init__()
        self.register_buffer("centres", torch.zeros(pairs, classes, width))
        self.register_buffer("seen", torch.zeros(classes, dtype=torch.bool))

    def advance(self, *columns: torch.Tensor) -> None:
        """One example after another: its class keeps the share `rate` of its centre, and takes the rest from the teacher.

        Args:
                columns: the teacher's embeddings (E, L, H), the rates (E, L), and the classes (E,), below 0 of examples that do
                not count.
        """
        teacher, rates, classes = columns
        counts, places = classes >= 0, classes.clamp(min=0)
        same = (classes[:, None] == classes) & counts[:, None] & counts
        first = ~self.seen[places] & ~same.tril(-1).any(1)  # there is no centre yet of which a share could stay
        rates = rates.masked_fill(first[:, None], 0.0)
        # Of an example stays what all later ones of its class let stay, and of the centre what all of them do.
        later = torch.where(same.triu(1)[..., None], rates, 1.0).prod(1)
        parts = ((1 - rates) * later).unsqueeze(-1) * teacher
        shares = torch.ones_like(self.centres[..., 0])  # (L, C)
        shares.scatter_reduce_(1, places.expand(len(shares), -1), torch.where(counts[:, None], rates, 1.0).T, "prod")
        self.centres *= shares.unsqueeze(-1)
        self.centres.index_add_(1, places, (parts * counts[:, None, None]).transpose(0, 1))
        self.seen |= torch.zeros_like(self.seen, dtype=torch.long).index_add_(0, places, counts.long()) > 0
