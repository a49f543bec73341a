"""Label loss and divergences of whole logits by their formulas, and small heads to compare with."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from distill_llm.losses.chunked_head import head_losses
from distill_llm.losses.head import Head
from distill_llm.losses.head_parts import Comparison, DivergencePart, LabelPart, Part, SparsePart
from distill_llm.losses.sparse import SparseTargets


class HeadSums(NamedTuple):
    """Label loss and divergence, summed over items, and both by their weights."""

    total: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor


ITEMS, CLASSES, TEACHER_CLASSES = 23, 37, 41


def dense_logits(head: Head, hidden: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, head.weight, head.bias).to(torch.promote_types(hidden.dtype, torch.float32)) * head.scale
    return logits if head.softcap is None else torch.tanh(logits / head.softcap) * head.softcap


def dense_divergence(
    name: str, s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, **p: float
) -> torch.Tensor:
    """(N,) by the definitions, on logits that are already over the temperature."""
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    q, p_ = log_q.exp(), log_p.exp()

    def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    if name == "forward_kl":
        return (p_ * (log_p - log_q)).sum(-1)
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    if name == "jsd":
        beta = p.get("beta", 0.5)
        mixture = beta * p_ + (1 - beta) * q
        return beta * kl(p_, mixture) + (1 - beta) * kl(q, mixture)
    if name == "skew_kl":
        skew = p.get("skew", 0.1)
        return kl(p_, skew * p_ + (1 - skew) * q)
    if name == "skew_reverse_kl":
        skew = p.get("skew", 0.1)
        return kl(q, (1 - skew) * p_ + skew * q)
    if name == "tvd":
        return 0.5 * (p_ - q).abs().sum(-1)
    if name == "mse":
        return (s - t).square().sum(-1)
    if name == "probability_mse":
        return (p_ - q).square().sum(-1)
    if name == "huber":
        far = (s - t).abs()
        return torch.where(
            far < p.get("delta", 1.0), far**2 / 2, p.get("delta", 1.0) * (far - p.get("delta", 1.0) / 2)
        ).sum(-1)
    values = []
    assert name == "dkd" and labels is not None
    for row, label in enumerate(labels.tolist()):
        if label < 0:
            values.append(s.new_zeros(()))
            continue
        others = torch.tensor([i for i in range(s.shape[1]) if i != label])
        binary_p = torch.stack([p_[row, label], p_[row, others].sum()])
        binary_q = torch.stack([q[row, label], q[row, others].sum()])
        rest_p, rest_q = p_[row, others] / binary_p[1], q[row, others] / binary_q[1]
        values.append(p.get("alpha", 1.0) * kl(binary_p, binary_q) + p.get("beta", 8.0) * kl(rest_p, rest_q))
    return torch.stack(values)


def dense(
    student: Head,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    teacher: Head | None,
    teacher_hidden: torch.Tensor | None,
    *,
    label_weight: float = 1.0,
    logits_weight: float = 1.0,
    divergence: str = "forward_kl",
    settings: dict[str, float] | None = None,
    temperature: float = 1.0,
    classes: int | None = None,
    smoothing: float = 0.0,
) -> HeadSums:
    logits = dense_logits(student, hidden)
    label_sum = value = logits.new_zeros(())
    if labels is not None:
        label_sum = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum", label_smoothing=smoothing)
    if teacher is not None and teacher_hidden is not None:
        shared = classes or min(len(student.weight), len(teacher.weight))
        target = dense_logits(teacher, teacher_hidden)[:, :shared].detach()
        s, t = logits[:, :shared] / temperature, target / temperature
        value = temperature**2 * dense_divergence(divergence, s, t, labels, **(settings or {})).sum()
    return HeadSums(label_weight * label_sum + logits_weight * value, label_sum, value)


def chunked(
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
) -> HeadSums:
    """`head_losses` with a part for the labels, if there are any, and one for a teacher or sparse targets, if there are any."""
    how, parts = Comparison(divergence, settings or {}, temperature, classes), dict[str, Part]()
    if labels is not None:
        parts["labels"] = LabelPart(labels, smoothing, label_weight)
    if teacher is not None and teacher_hidden is not None:
        parts["logits"] = DivergencePart(how, teacher, teacher_hidden, labels, logits_weight)
    if targets is not None:
        parts["logits"] = SparsePart(how, targets, logits_weight)
    found = head_losses(student, student_hidden, list(parts.values()), chunk)
    sums = dict(zip(parts, found.sums, strict=True))
    nothing = student_hidden.new_zeros((), dtype=torch.float32)
    return HeadSums(found.total, sums.get("labels", nothing), sums.get("logits", nothing))


def case(seed: int = 0, items: int = ITEMS, bias: bool = True, **post: Any) -> dict[str, Any]:
    """Student of width 8 and 37 classes, teacher of width 12 and 41; every fifth item without a label."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    labels = torch.randint(0, CLASSES, (items,), generator=generator)
    labels[::5] = -100
    teacher = Head(normal(TEACHER_CLASSES, 12) * 0.4, normal(TEACHER_CLASSES) if bias else None, **post)
    student = Head(normal(CLASSES, 8) * 0.4, normal(CLASSES) if bias else None, **post)
    return {
        "student": student,
        "hidden": normal(items, 8),
        "labels": labels,
        "teacher": teacher,
        "teacher_hidden": normal(items, 12),
    }


def leaves(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The case in `dtype`, with the student's tensors as leaves that want gradients."""

    def head(value: Head) -> Head:
        bias = None if value.bias is None else value.bias.to(dtype).requires_grad_()
        return Head(value.weight.to(dtype).requires_grad_(), bias, value.scale, value.softcap)

    return {
        "student": head(given["student"]),
        "hidden": given["hidden"].to(dtype).requires_grad_(),
        "labels": given["labels"],
        "teacher": None if given["teacher"] is None else head(given["teacher"]),
        "teacher_hidden": None if given["teacher"] is None else given["teacher_hidden"].to(dtype),
    }


def gradients(function: Any, given: dict[str, Any], **options: Any) -> tuple[HeadSums, list[torch.Tensor]]:
    found = function(*given.values(), **options)
    wanted = [given["hidden"], given["student"].weight, given["student"].bias]
    return found, list(torch.autograd.grad(found.total, [tensor for tensor in wanted if tensor is not None]))


def assert_equals_dense(given: dict[str, Any], chunk: int = 7, **options: Any) -> None:
    """Chunked in fp32 equals dense in fp64: values to 1e-5 of their size, gradients to 1e-5 of their largest entry."""
    exact, expected = gradients(dense, leaves(given, torch.float64), **options)
    found, got = gradients(chunked, leaves(given, torch.float32), chunk=chunk, **options)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other).abs().max() < 1e-5 * max(1.0, other.abs().max().item())
