"""Losses of a language-model head whose logits are never held whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from distill_llm.losses.head import Head
from distill_llm.losses.head_parts import Chunks, Part, Place
from distill_llm.losses.weight_gradient import WeightGradient

CHUNK_BYTES = 5 * 2**26  # of the student's logits in the products' dtype, and half as much of the teacher's
BLOCK_LOGITS = {"cpu": 2**19}  # held in fp32, in six buffers: on a CPU they should stay in its cache
BLOCK_LOGITS_ELSEWHERE = 2**24


class HeadLosses(NamedTuple):
    """Sums over the items, 0-dim in fp32: `total` carries gradients; `sums`, a part each without its factor, do not."""

    total: torch.Tensor
    sums: tuple[torch.Tensor, ...]


def head_losses(
    student: Head, student_hidden: torch.Tensor, parts: Sequence[Part], chunk: int | None = None
) -> HeadLosses:
    """The sum over parts, each multiplied by its factor, of their values over N items.

    Loss and gradients are made together, a chunk of items at a time, so that at most chunk x V logits of either model
    exist; the backward pass only multiplies by the incoming gradient, in place: it can run once. Products run in the dtype of
    the hidden states (under autocast, in autocast's); softmax, sums and the weight's gradient over chunks are fp32.

    Args:
        student: gradients go to `weight`, `bias` where they require them.
        student_hidden: (N, H) inputs of the head, valid tokens only; N may be 0.
        parts: the losses (see `distill_llm.losses.head_parts`).
        chunk: items at a time; None: as many as make 320 MiB of logits.

    Raises:
        InputError: a part does not fit the items or the vocabulary.
    """
    items, vocabulary, device = len(student_hidden), len(student.weight), student_hidden.device
    for part in parts:
        part.check(items, vocabulary)
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else student_hidden.dtype
    weights = tuple(part.weight(device) for part in parts)
    unit = torch.ones((), device=device)
    if dtype == torch.float16:  # gradients of a mean would vanish in it
        for part, weight in zip(parts, weights, strict=True):
            steepest = weight.abs() * part.steepness
            unit = steepest if part is parts[0] else torch.maximum(unit, steepest)
        unit = unit.clamp_min(torch.finfo(torch.float32).tiny)
    most = chunk or max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize))
    work = _Work(
        student.first(vocabulary), tuple(parts), weights, unit, _divided(items, vocabulary, most, dtype, device)
    )
    wanted = torch.is_grad_enabled()
    total, *sums = _HeadLosses.apply(student_hidden, student.weight, student.bias, work, wanted)
    return HeadLosses(total, tuple(sums))


def _divided(items: int, vocabulary: int, most: int, dtype: torch.dtype, device: torch.device) -> Chunks:
    chunk = max(1, -(-items // max(1, -(-items // most))))  # all about as long
    return Chunks(items, vocabulary, chunk, min(_block_rows(device.type, vocabulary), chunk), dtype, device)


def _block_rows(device: str, vocabulary: int) -> int:
    """Items at a time in fp32; on a CPU as many for one thread as for another, since softmax shares out whole rows."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    return threads * max(1, BLOCK_LOGITS.get(device, BLOCK_LOGITS_ELSEWHERE) // (vocabulary * threads))


@dataclass(frozen=True)
class _Work:
    """What `head_losses` was asked for: the head without gradient, and the gradients' unit in the products' dtype."""

    student: Head
    parts: tuple[Part, ...]
    weights: tuple[torch.Tensor, ...]
    unit: torch.Tensor
    chunks: Chunks

    def block(
        self, products: torch.Tensor, place: Place, values: torch.Tensor, buffers: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """The gradient in the student's products of a few items, in units of `unit`.

        Args:
            products: (R, V) of hidden states and weight.
            place: which items.
            values: (parts, N), where the values of these items are put.
            buffers: two of (R, V) in fp32.
        """
        logits, gradient = buffers[0], buffers[1].zero_()
        self.student.finish(products, logits)
        for number, part in enumerate(self.parts):
            values[number, place.first : place.last] = part.block(logits, gradient, place, untouched=not number)
        if self.student.softcap is not None:
            gradient.mul_(logits.div_(self.student.softcap).square_().neg_().add_(1))
        if self.student.scale != 1:
            gradient.mul_(self.student.scale)
        return gradient


class _HeadLosses(torch.autograd.Function):
    """Losses and gradients in one pass over chunks of items."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: _Work, wanted: bool
    ) -> tuple[torch.Tensor, ...]:
        """The total and the sum of each part; `wanted`: whether any gradient is."""
        with torch.autocast(hidden.device.type, enabled=False):
            values, gradients = _run(work, hidden, [wanted and needed for needed in ctx.needs_input_grad[:3]])
        ctx.unit, ctx.gradients = work.unit, gradients
        sums = tuple(each.sum() for each in values)
        ctx.mark_non_differentiable(*sums)
        total = hidden.new_zeros((), dtype=torch.float32)
        for weight_of_part, each in zip(work.weights, sums, strict=True):
            total = total + weight_of_part * each
        return total, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients times that of the total; they are handed on, not copied: the weight's is as large as the weight."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "head_losses keeps its gradients for one backward pass only: add the losses up first, or call it again"
            )
        factor = outputs[0] * ctx.unit
        return *(None if gradient is None else gradient.mul_(factor) for gradient in gradients), None, None


def _run(work: _Work, hidden: torch.Tensor, wanted: list[bool]) -> tuple[torch.Tensor, tuple[torch.Tensor | None, ...]]:
    """(parts, N) values; gradients of hidden states, weight and bias where wanted."""
    chunks, student = work.chunks, work.student.to(work.chunks.dtype)
    items, vocabulary = chunks.items, chunks.vocabulary
    inputs = hidden.detach().to(chunks.dtype)
    values = hidden.new_zeros(len(work.parts), items, dtype=torch.float32)
    of_hidden = torch.empty_like(inputs) if wanted[0] else None
    of_bias = hidden.new_zeros(vocabulary, dtype=torch.float32) if wanted[2] else None
    count = -(-items // chunks.chunk)
    of_weight = WeightGradient(student.weight, work.student.weight.dtype, count) if wanted[1] else None
    products = inputs.new_empty(min(chunks.chunk, items), vocabulary)
    logits, slopes = (hidden.new_empty(chunks.rows, vocabulary, dtype=torch.float32) for _ in range(2))
    for part, weight in zip(work.parts, work.weights, strict=True):
        part.start(chunks, weight / work.unit)
    for begin in range(0, items, chunks.chunk):
        end = min(begin + chunks.chunk, items)
        here = products[: end - begin]
        student.products(inputs[begin:end], here)
        for first in range(begin, end, chunks.rows):
            last = min(first + chunks.rows, end)
            part_of_it = here[first - begin : last - begin]
            gradient = work.block(
                part_of_it, Place(begin, end, first, last), values, (logits[: last - first], slopes[: last - first])
            )
            part_of_it.copy_(gradient)
            if of_bias is not None:
                of_bias += gradient.sum(0)
        if of_hidden is not None:
            torch.mm(here, student.weight, out=of_hidden[begin:end])
        if of_weight is not None:
            of_weight.add(here, inputs[begin:end])
    return values, (
        None if of_hidden is None else of_hidden.to(hidden.dtype),
        None if of_weight is None else of_weight.result().to(work.student.weight.dtype),
        None if of_bias is None or work.student.bias is None else of_bias.to(work.student.bias.dtype),
    )
