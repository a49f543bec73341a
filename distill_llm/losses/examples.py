"""States of examples, and what is computed over all examples of a batch: of one micro-batch, or gathered over processes."""

from collections.abc import Callable

import torch
from torch import distributed

Relation = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def pooled(states: torch.Tensor, valid: torch.Tensor, pool: str) -> torch.Tensor:
    """One state of each example, (B, H) in fp32.

    Args:
        states: (B, T, H).
        valid: (B, T), 1 at valid tokens and 0 at padding on either side.
        pool: `first` or `last` valid token, or the `mean` of all.
    """
    states, mask = states.float(), valid.bool()
    if pool == "mean":
        return (states * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if pool == "first":
        place = places.masked_fill(~mask, mask.shape[1] - 1).amin(1)
    else:
        place = places.masked_fill(~mask, 0).amax(1)
    return states[torch.arange(len(states), device=states.device), place]


def over_examples(relation: Relation, student: torch.Tensor, teacher: torch.Tensor, gathered: bool) -> torch.Tensor:
    """The number of examples times a mean over relations between them, 0-dim.

    Args:
        relation: from (E, H) and (E, H') states of the same examples to a 0-dim mean.
        student: (B, H) of this micro-batch.
        teacher: (B, H'), no gradient.
        gathered: relate the examples of all processes, which may have different numbers of them. The values of all processes
            add up to the whole, and each has the whole's gradient in its own examples, which the sum over processes makes
            complete.
    """
    processes = distributed.get_world_size() if gathered and distributed.is_initialized() else 1
    if processes == 1:
        return len(student) * relation(student, teacher)
    states, targets = gathered_rows(student.detach(), processes), gathered_rows(teacher, processes)
    states[distributed.get_rank()] = student
    total = sum(map(len, states)) * relation(torch.cat(states), torch.cat(targets))
    return total.detach() / processes + total - total.detach()


def gathered_rows(rows: torch.Tensor, processes: int) -> list[torch.Tensor]:
    """The (B, ...) rows of each process, whose B may differ; waits for the device."""
    counts = [torch.empty(1, dtype=torch.long, device=rows.device) for _ in range(processes)]
    distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    lengths = [int(each) for each in counts]
    filled = torch.cat([rows, rows.new_zeros(max(lengths) - len(rows), *rows.shape[1:])])
    found = [torch.empty_like(filled) for _ in range(processes)]
    distributed.all_gather(found, filled)
    return [each[:length] for each, length in zip(found, lengths, strict=True)]


def distances(states: torch.Tensor) -> torch.Tensor:
    """(E, E) Euclidean distances; the slope at a distance of 0 is 0."""
    return torch.cdist(states, states, compute_mode="donot_use_mm_for_euclid_dist")


def others(count: int, device: torch.device) -> torch.Tensor:
    """(E, E) of bool: all but the diagonal."""
    return ~torch.eye(count, dtype=torch.bool, device=device)


def mean_over(values: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The mean of chosen values; 0 where there are none."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)
