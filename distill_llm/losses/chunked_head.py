"""Label loss and divergence of a language-model head whose logits are never held whole."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from distill_llm.common.errors import InputError
from distill_llm.losses.head import Head
from distill_llm.losses.head_kernels import Block, Kernel, kernel_of, softmax_into
from distill_llm.losses.labels import IGNORED
from distill_llm.losses.sparse import SparseTargets, value_and_grad
from distill_llm.losses.weight_gradient import WeightGradient

CHUNK_BYTES = 5 * 2**26  # of the student's logits in the products' dtype, and half as much of the teacher's
BLOCK_LOGITS = {"cpu": 2**19}  # held in fp32, in six buffers: on a CPU they should stay in its cache
BLOCK_LOGITS_ELSEWHERE = 2**24


class HeadLosses(NamedTuple):
    """Sums over the items, 0-dim in fp32: `total` carries gradients, the unweighted parts do not."""

    total: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor


def head_losses(
    student: Head,
    student_hidden: torch.Tensor,
    labels: torch.Tensor | None = None,
    teacher: Head | None = None,
    teacher_hidden: torch.Tensor | None = None,
    *,
    targets: SparseTargets | None = None,
    label_weight: float | torch.Tensor = 1.0,
    logits_weight: float | torch.Tensor = 1.0,
    divergence: str = "forward_kl",
    settings: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    classes: int | None = None,
    smoothing: float = 0.0,
    chunk: int | None = None,
) -> HeadLosses:
    """label_weight * sum of cross-entropies + logits_weight * temperature^2 * sum of divergences, over N items.

    Loss and gradients are made together, a chunk of items at a time, so that at most chunk x V logits of either model
    exist; the backward pass only multiplies by the incoming gradient, in place: it can run once. Products run in the dtype of
    the hidden states (under autocast, in autocast's); softmax, sums and the weight's gradient over chunks are fp32.

    Args:
        student: gradients go to `weight`, `bias` where they require them.
        student_hidden: (N, H) inputs of the head, valid tokens only; N may be 0.
        labels: (N,) class ids, -100 for none; None: no label loss.
        teacher: its own width and padded vocabulary; None: no divergence. Never gets a gradient.
        teacher_hidden: (N, H of the teacher).
        targets: of the N items, from a teacher known at a few tokens of each, in place of its head: `forward_kl` at
            temperature 1, see `distill_llm.losses.sparse`.
        label_weight, logits_weight: numbers, or 0-dim tensors (which are not waited for) without gradient.
        divergence: a name of `distill_llm.losses.divergences.DIVERGENCES`, between the distributions at the temperature.
        settings: of the divergence, as its row has them (`beta`, `skew`, `alpha`, `top_k`).
        temperature: above 0.
        classes: the divergence compares the first `classes` logits only; None: as many as both vocabularies have. The label
            loss is over the student's whole vocabulary.
        smoothing: share of the label spread evenly over the student's classes.
        chunk: items at a time; None: as many as make 320 MiB of logits.

    Raises:
        InputError: unknown divergence or settings, shapes that do not fit, a divergence that needs labels without them, or
            sparse targets with another divergence than theirs.
    """
    if (teacher is None) != (teacher_hidden is None):
        raise InputError(
            "teacher_hidden",
            None if teacher_hidden is None else "a tensor",
            "both head and hidden states of the teacher, or neither",
        )
    vocabulary = len(student.weight)
    kernel = kernel_of(divergence, settings or {}, labels is not None)
    if teacher is not None and teacher_hidden is not None:
        if len(teacher_hidden) != len(student_hidden):
            raise InputError("teacher_hidden", f"{len(teacher_hidden)} items", f"the student's {len(student_hidden)}")
        shared = min(vocabulary, len(teacher.weight))
        if classes is not None and not 0 < classes <= shared:
            raise InputError("classes", classes, f"1 to {shared}, the smaller vocabulary")
        teacher, teacher_hidden = teacher.first(classes or shared), teacher_hidden.detach()
    if targets is not None:
        _check_sparse(targets, len(student_hidden), teacher, (divergence, settings or {}, temperature))
    if labels is not None and labels.shape != student_hidden.shape[:1]:
        raise InputError("labels", f"shape {list(labels.shape)}", f"[{len(student_hidden)}], one of each item")
    if not temperature > 0:
        raise InputError("temperature", temperature, "above 0")
    device = student_hidden.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else student_hidden.dtype
    of_labels, of_logits = (
        torch.as_tensor(weight, dtype=torch.float32, device=device).detach() for weight in (label_weight, logits_weight)
    )
    unit = torch.ones((), device=device)
    if dtype == torch.float16:  # gradients of a mean would vanish in it
        unit = torch.maximum(of_labels.abs(), temperature * of_logits.abs()).clamp_min(torch.finfo(torch.float32).tiny)
    work = _Work(
        student.first(vocabulary),
        labels,
        teacher,
        teacher_hidden,
        of_labels,
        of_logits,
        kernel,
        temperature,
        smoothing,
        chunk or max(1, CHUNK_BYTES // (vocabulary * dtype.itemsize)),
        dtype,
        unit,
        targets,
        classes or vocabulary,
    )
    wanted = torch.is_grad_enabled()
    return HeadLosses(*_HeadLosses.apply(student_hidden, student.weight, student.bias, work, wanted))


def _check_sparse(targets: SparseTargets, items: int, teacher: Head | None, given: tuple[Any, ...]) -> None:
    if teacher is not None:
        raise InputError("targets", "beside a teacher's head", "one of the two")
    if len(targets.ids) != items:
        raise InputError("targets", f"{len(targets.ids)} items", f"the student's {items}")
    if given != ("forward_kl", {}, 1.0):
        accepted = "forward_kl without settings at temperature 1: all that sparse targets can tell"
        raise InputError("divergence", " ".join(map(str, given)), accepted)


@dataclass(frozen=True)
class _Work:
    """What `head_losses` was asked for; heads without gradient, the teacher's cut to the compared classes."""

    student: Head
    labels: torch.Tensor | None
    teacher: Head | None
    teacher_hidden: torch.Tensor | None
    label_weight: torch.Tensor
    logits_weight: torch.Tensor
    kernel: Kernel
    temperature: float
    smoothing: float
    chunk: int
    dtype: torch.dtype
    unit: torch.Tensor
    targets: SparseTargets | None
    classes: int

    def block(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor | None,
        labels: torch.Tensor | None,
        targets: SparseTargets | None,
        buffers: list[torch.Tensor],
    ) -> tuple[torch.Tensor | float, torch.Tensor | float, torch.Tensor]:
        """Label losses and divergences of a few items, and the gradient in the student's products, in units of `unit`.

        Args:
            student: (R, V) products of hidden states and weight.
            teacher: (R, C) the teacher's.
            labels: (R,).
            targets: of R items.
            buffers: two of (R, V) and four of (R, C), fp32.
        """
        logits, gradient = buffers[0], buffers[1].zero_()
        self.student.finish(student, logits)
        label_loss: torch.Tensor | float = 0.0
        value: torch.Tensor | float = 0.0
        if labels is not None:
            label_loss = self._label_loss(logits, labels, gradient)
        if self.teacher is not None and teacher is not None:
            block = Block(buffers[2], buffers[3], buffers[4], buffers[5], labels)
            classes = teacher.shape[1]
            self.teacher.finish(teacher, block.teacher).div_(self.temperature)
            torch.div(logits[:, :classes], self.temperature, out=block.student)
            value, slope = self.kernel(block)
            value = value * self.temperature**2
            gradient[:, :classes].addcmul_(slope, self.logits_weight / self.unit, value=self.temperature)
        if targets is not None:
            cross_entropy, sparse_slope = value_and_grad(logits[:, : self.classes], targets)
            assert sparse_slope is not None
            value = cross_entropy - targets.teacher_nll
            gradient[:, : self.classes].addcmul_(sparse_slope, self.logits_weight / self.unit)
        if self.student.softcap is not None:
            gradient.mul_(logits.div_(self.student.softcap).square_().neg_().add_(1))
        if self.student.scale != 1:
            gradient.mul_(self.student.scale)
        return label_loss, value, gradient

    def _label_loss(self, logits: torch.Tensor, labels: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of each item (R,); its weighted gradient goes into `gradient`."""
        counted = (labels != IGNORED).unsqueeze(1)
        target = labels.unsqueeze(1).where(counted, 0)
        normaliser = softmax_into(logits, gradient)
        value = normaliser - (1 - self.smoothing) * logits.gather(1, target)
        if self.smoothing:
            value -= self.smoothing * logits.mean(1, keepdim=True)
            gradient.sub_(self.smoothing / logits.shape[1])
        gradient.scatter_add_(1, target, gradient.new_full(target.shape, self.smoothing - 1))
        gradient.mul_(counted * (self.label_weight / self.unit))
        return (value * counted).squeeze(1)


class _HeadLosses(torch.autograd.Function):
    """Losses and gradients in one pass over chunks of items."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, work: _Work, wanted: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(total, labels, logits); `wanted`: whether any gradient is."""
        with torch.autocast(hidden.device.type, enabled=False):
            losses, gradients = _run(work, hidden, [wanted and needed for needed in ctx.needs_input_grad[:3]])
        ctx.unit, ctx.gradients = work.unit, gradients
        labels, logits = losses
        ctx.mark_non_differentiable(labels, logits)
        return work.label_weight * labels + work.logits_weight * logits, labels, logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The gradients times that of the total; they are handed on, not copied: the weight's is as large as the weight."""
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "head_losses keeps its gradients for one backward pass: add the losses up, or call it again"
            )
        factor = outputs[0] * ctx.unit
        return *(None if gradient is None else gradient.mul_(factor) for gradient in gradients), None, None


def _run(
    work: _Work, hidden: torch.Tensor, wanted: list[bool]
) -> tuple[tuple[torch.Tensor, torch.Tensor], list[torch.Tensor | None]]:
    """Sums of the label loss and the divergence; gradients of hidden states, weight and bias where wanted."""
    items, vocabulary = len(hidden), len(work.student.weight)
    student, teacher = work.student.to(work.dtype), None if work.teacher is None else work.teacher.to(work.dtype)
    inputs = hidden.detach().to(work.dtype)
    label_losses, values = hidden.new_zeros(2, items, dtype=torch.float32)
    of_hidden = torch.empty_like(inputs) if wanted[0] else None
    of_bias = hidden.new_zeros(vocabulary, dtype=torch.float32) if wanted[2] else None
    chunks = -(-items // work.chunk)
    chunk = -(-items // max(1, chunks))  # all about as long
    rows = min(_block_rows(hidden.device.type, vocabulary), max(1, chunk))
    span = rows * -(-chunk // (2 * rows))  # items whose teacher's logits are made at once: half a chunk
    width = 0 if teacher is None else len(teacher.weight)
    products, targets = inputs.new_empty(chunk, vocabulary), inputs.new_empty(span, width)
    buffers = [hidden.new_empty(rows, size, dtype=torch.float32) for size in (vocabulary,) * 2 + (width,) * 4]
    of_weight = WeightGradient(student.weight, work.student.weight.dtype, chunks) if wanted[1] else None
    for begin in range(0, items, max(1, chunk)):
        end = min(begin + chunk, items)
        here = products[: end - begin]
        student.products(inputs[begin:end], here)
        for first in range(begin, end, rows):
            last, offset = min(first + rows, end), (first - begin) % span
            if teacher is not None and work.teacher_hidden is not None and not offset:
                stop = min(first + span, end)
                teacher.products(work.teacher_hidden[first:stop].to(work.dtype), targets[: stop - first])
            part = here[first - begin : last - begin]
            label_losses[first:last], values[first:last], gradient = work.block(
                part,
                None if teacher is None else targets[offset : offset + last - first],
                None if work.labels is None else work.labels[first:last],
                None if work.targets is None else work.targets.rows(slice(first, last)),
                [buffer[: last - first] for buffer in buffers],
            )
            part.copy_(gradient)
            if of_bias is not None:
                of_bias += gradient.sum(0)
        if of_hidden is not None:
            torch.mm(here, student.weight, out=of_hidden[begin:end])
        if of_weight is not None:
            of_weight.add(here, inputs[begin:end])
    gradients = [
        None if of_hidden is None else of_hidden.to(hidden.dtype),
        None if of_weight is None else of_weight.result().to(work.student.weight.dtype),
        None if of_bias is None or work.student.bias is None else of_bias.to(work.student.bias.dtype),
    ]
    return (label_losses.sum(), values.sum()), gradients


def _block_rows(device: str, vocabulary: int) -> int:
    """Items at a time in fp32; on a CPU as many for one thread as for another, since softmax shares out whole rows."""
    threads = torch.get_num_threads() if device == "cpu" else 1
    return threads * max(1, BLOCK_LOGITS.get(device, BLOCK_LOGITS_ELSEWHERE) // (vocabulary * threads))
