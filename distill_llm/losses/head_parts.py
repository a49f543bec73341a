"""The losses that are made of a language model's outputs while its logits pass by, a block of items at a time.

Each is a part of `head_losses`: it gives the values of a block's items and adds their gradient to that of the block's logits.
A part serves one call.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from distill_llm.common.errors import InputError
from distill_llm.losses.head import Head
from distill_llm.losses.head_kernels import Block, Kernel, by_autograd, kernel_of, softmax_into
from distill_llm.losses.labels import IGNORED
from distill_llm.losses.sparse import SparseTargets, value_and_grad


@dataclass(frozen=True)
class Chunks:
    """How items are divided: products of `chunk` items, blocks of `rows` items in fp32; products are in `dtype`."""

    items: int
    vocabulary: int
    chunk: int
    rows: int
    dtype: torch.dtype
    device: torch.device


class Place(NamedTuple):
    """A block: the items from `first` to `last`, of the chunk from `begin` to `end`."""

    begin: int
    end: int
    first: int
    last: int


class Part(ABC):
    """One loss of the outputs.

    Args:
        factor: a number or a 0-dim tensor without gradient (which is not waited for): what the sum is multiplied by.
    """

    steepness = 1.0
    """How large an entry of a value's gradient in the logits can be, about."""

    def __init__(self, factor: float | torch.Tensor = 1.0):
        self.factor = factor

    def weight(self, device: torch.device) -> torch.Tensor:
        """The factor as a tensor in fp32."""
        return torch.as_tensor(self.factor, dtype=torch.float32, device=device).detach()

    @abstractmethod
    def check(self, items: int, vocabulary: int) -> None:
        """Raise an InputError where the part does not fit so many items or classes of the student."""

    def start(self, chunks: Chunks, slope: torch.Tensor) -> None:
        """Before the first block; `slope`: what the gradient of the values is multiplied by."""
        self.slope = slope

    @abstractmethod
    def block(self, logits: torch.Tensor, gradient: torch.Tensor, place: Place, untouched: bool) -> torch.Tensor:
        """Values (R,) of the items of a block.

        Args:
            logits: (R, V) of the student, fp32, to be left as they are.
            gradient: (R, V) fp32, to add the gradient to.
            untouched: whether `gradient` is still zero, so that it may be overwritten.
        """


class LabelPart(Part):
    """Cross-entropy over the student's whole vocabulary.

    Args:
        labels: (N,) class ids, -100 for none.
        smoothing: share of the label spread evenly over the classes.
        factor: see `Part`.
    """

    def __init__(self, labels: torch.Tensor, smoothing: float = 0.0, factor: float | torch.Tensor = 1.0):
        super().__init__(factor)
        self.labels, self.smoothing = labels, smoothing

    def check(self, items: int, vocabulary: int) -> None:
        """Labels must be one of each item."""
        _check_labels(self.labels, items)

    def block(self, logits: torch.Tensor, gradient: torch.Tensor, place: Place, untouched: bool) -> torch.Tensor:
        """See `Part.block`."""
        labels = self.labels[place.first : place.last]
        counted = (labels != IGNORED).unsqueeze(1)
        target = labels.unsqueeze(1).where(counted, 0)
        own = gradient if untouched else torch.empty_like(gradient)
        normaliser = softmax_into(logits, own)
        value = normaliser - (1 - self.smoothing) * logits.gather(1, target)
        if self.smoothing:
            value -= self.smoothing * logits.mean(1, keepdim=True)
            own.sub_(self.smoothing / logits.shape[1])
        own.scatter_add_(1, target, own.new_full(target.shape, self.smoothing - 1))
        own.mul_(counted * self.slope)
        if not untouched:
            gradient.add_(own)
        return (value * counted).squeeze(1)


@dataclass(frozen=True)
class Comparison:
    """How the outputs of two models are compared.

    Attributes:
        divergence: a name of `distill_llm.losses.divergences.DIVERGENCES`; or a function of (R, C) logits of student and
            teacher, over the temperature, to (R,) values, which is differentiated.
        settings: of the divergence, as its row has them (`beta`, `skew`, `alpha`, `top_k`).
        temperature: above 0; values are multiplied by its square.
        classes: compare the first `classes` logits only; None: as many as both vocabularies have.
    """

    divergence: str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = "forward_kl"
    settings: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 1.0
    classes: int | None = None

    def kernel(self, labelled: bool) -> Kernel:
        """What computes values and gradients of a block; errors as of `kernel_of`."""
        if callable(self.divergence):
            return by_autograd(self.divergence)
        return kernel_of(self.divergence, self.settings, labelled)

    def check(self) -> None:
        """Raise an InputError for a temperature that is none."""
        if not self.temperature > 0:
            raise InputError("temperature", self.temperature, "above 0")


class DivergencePart(Part):
    """The divergence from a teacher whose logits are made by its own output map.

    Args:
        how: see `Comparison`.
        teacher: its own width and padded vocabulary; it never gets a gradient.
        teacher_hidden: (N, H of the teacher), inputs of its output map.
        labels: (N,), for a divergence that needs them.
        factor: see `Part`.
        weights: (N,) what each value is multiplied by; None: 1.
    """

    def __init__(
        self,
        how: Comparison,
        teacher: Head,
        teacher_hidden: torch.Tensor,
        labels: torch.Tensor | None = None,
        factor: float | torch.Tensor = 1.0,
        weights: torch.Tensor | None = None,
    ):
        super().__init__(factor)
        self.weights = weights
        self.how, self.teacher, self.teacher_hidden = how, teacher, teacher_hidden.detach()
        self.labels, self.kernel = labels, how.kernel(labels is not None)
        self.steepness = how.temperature

    def check(self, items: int, vocabulary: int) -> None:
        """Items and classes must be the student's."""
        self.how.check()
        if len(self.teacher_hidden) != items:
            raise InputError("teacher_hidden", f"{len(self.teacher_hidden)} items", f"the student's {items}")
        shared = min(vocabulary, len(self.teacher.weight))
        if self.how.classes is not None and not 0 < self.how.classes <= shared:
            raise InputError("classes", self.how.classes, f"1 to {shared}, the smaller vocabulary")
        if self.labels is not None:
            _check_labels(self.labels, items)
        self.width = self.how.classes or shared

    def start(self, chunks: Chunks, slope: torch.Tensor) -> None:
        """Make the buffers; the teacher's logits are made for half a chunk at a time."""
        super().start(chunks, slope)
        self.head = self.teacher.first(self.width).to(chunks.dtype)
        self.span = chunks.rows * -(-chunks.chunk // (2 * chunks.rows))
        self.products = torch.empty(self.span, self.width, dtype=chunks.dtype, device=chunks.device)
        self.buffers = [
            torch.empty(chunks.rows, self.width, dtype=torch.float32, device=chunks.device) for _ in range(4)
        ]

    def block(self, logits: torch.Tensor, gradient: torch.Tensor, place: Place, untouched: bool) -> torch.Tensor:
        """See `Part.block`."""
        rows, offset = place.last - place.first, (place.first - place.begin) % self.span
        if not offset:
            stop = min(place.first + self.span, place.end)
            hidden = self.teacher_hidden[place.first : stop].to(self.products.dtype)
            self.head.products(hidden, self.products[: stop - place.first])
        labels = None if self.labels is None else self.labels[place.first : place.last]
        student, teacher, q, p = (buffer[:rows] for buffer in self.buffers)
        block = Block(student, teacher, q, p, labels)
        self.head.finish(self.products[offset : offset + rows], block.teacher).div_(self.how.temperature)
        torch.div(logits[:, : self.width], self.how.temperature, out=block.student)
        value, slope = self._compared(block, place)
        weights = None if self.weights is None else self.weights[place.first : place.last]
        factor = self.slope if weights is None else self.slope * weights[:, None]
        gradient[:, : self.width].addcmul_(slope, factor, value=self.how.temperature)
        value = value * self.how.temperature**2
        return value if weights is None else value * weights

    def _compared(self, block: Block, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        """Values and gradients of a block."""
        return self.kernel(block)


class SplitPart(DivergencePart):
    """The same with another divergence from some item on.

    Args:
        how: see `DivergencePart`; its temperature holds for both.
        later: the other divergence.
        border: how many items come before it.
        teacher, teacher_hidden, weights, factor: see `DivergencePart`.
    """

    def __init__(
        self,
        how: Comparison,
        later: Comparison,
        border: int,
        teacher: Head,
        teacher_hidden: torch.Tensor,
        weights: torch.Tensor | None = None,
        factor: float | torch.Tensor = 1.0,
    ):
        super().__init__(how, teacher, teacher_hidden, None, factor, weights)
        self.border, self.later = border, later.kernel(False)

    def _compared(self, block: Block, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
        rows = place.last - place.first
        cut = min(max(self.border - place.first, 0), rows)
        if cut in (0, rows):
            return (self.kernel if cut else self.later)(block)
        parts = (slice(cut), slice(cut, rows))
        halves = (Block(block.student[p], block.teacher[p], block.q[p], block.p[p], None) for p in parts)
        found = [kernel(half) for kernel, half in zip((self.kernel, self.later), halves, strict=True)]
        value, slope = (torch.cat(each) for each in zip(*found, strict=True))
        return value, slope


class SparsePart(Part):
    """`sparse_forward_kl`, from a teacher that is known at a few tokens of each item.

    Args:
        how: `forward_kl` at temperature 1, all that sparse targets can tell.
        targets: of the N items.
        factor: see `Part`.
    """

    def __init__(self, how: Comparison, targets: SparseTargets, factor: float | torch.Tensor = 1.0):
        super().__init__(factor)
        self.how, self.targets = how, targets

    def check(self, items: int, vocabulary: int) -> None:
        """Targets must be of these items; they allow one divergence."""
        if len(self.targets.ids) != items:
            raise InputError("targets", f"{len(self.targets.ids)} items", f"the student's {items}")
        given = (self.how.divergence, dict(self.how.settings), self.how.temperature)
        if given != ("forward_kl", {}, 1.0):
            accepted = "forward_kl without settings, at temperature 1: sparse targets allow no other divergence"
            raise InputError("divergence", " ".join(map(str, given)), accepted)

    def block(self, logits: torch.Tensor, gradient: torch.Tensor, place: Place, untouched: bool) -> torch.Tensor:
        """See `Part.block`."""
        classes = self.how.classes or logits.shape[1]
        targets = self.targets.rows(slice(place.first, place.last))
        cross_entropy, slope = value_and_grad(logits[:, :classes], targets)
        assert slope is not None
        gradient[:, :classes].addcmul_(slope, self.slope)
        return cross_entropy - targets.teacher_nll


def _check_labels(labels: torch.Tensor, items: int) -> None:
    if labels.shape != (items,):
        raise InputError("labels", f"shape {list(labels.shape)}", f"shape [{items}], one label for each item")
