"""Classes that a model masks with minus infinity: values and gradients are those over the other classes, in float64."""

import math
from collections.abc import Sequence

import pytest
import torch
from builders.heads import chunked
from torch.nn.functional import huber_loss

from distill_llm.losses.divergences import DIVERGENCES
from distill_llm.losses.head import Head
from distill_llm.losses.labels import label_loss
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.sparse import SparseTargets, entropy_of, sparse_forward_kl
from distill_llm.pruning.statistics.calibration_loss import divergences as calibration_divergences

SETTINGS = {
    "forward_kl": [{}, {"top_k": 3}, {"top_k": 8}],
    "reverse_kl": [{}, {"top_k": 3}],
    "jsd": [{}, {"beta": 0.3}, {"top_k": 3}],
    "skew_kl": [{}, {"skew": 0.4}, {"top_k": 3}],
    "skew_reverse_kl": [{}, {"skew": 0.4}, {"top_k": 3}],
    "tvd": [{}, {"top_k": 3}],
    "mse": [{}],
    "probability_mse": [{}],
    "huber": [{}, {"delta": 0.5}],
    "dkd": [{}, {"alpha": 0.5, "beta": 2.0}],
}
CASES = [(name, settings) for name, several in SETTINGS.items() for settings in several]
CLASSES, MASKED, T = 9, (0, 4, 8), 1.5
LEFT = [c for c in range(CLASSES) if c not in MASKED]
LABELS = torch.tensor([LEFT[i % len(LEFT)] for i in range(7)])


def logits(seed: int, *shape: int) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masked(values: torch.Tensor) -> torch.Tensor:
    return values.index_fill(-1, torch.tensor(MASKED), -math.inf)


def kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.xlogy(a, a).sum(-1) - (a * b.log()).sum(-1)


def by_definition(name: str, z: torch.Tensor, t: torch.Tensor, settings: dict, labels: Sequence[int]) -> torch.Tensor:
    """The formulas on probabilities of the classes that are left, float64; differentiable."""
    q, p = (z / T).softmax(-1), (t / T).softmax(-1)
    if (k := settings.get("top_k")) is not None and k < p.shape[-1]:
        best = torch.stack([row.argsort(descending=True)[:k] for row in p])
        q, p = (torch.cat([each.gather(1, best), 1 - each.gather(1, best).sum(1, keepdim=True)], 1) for each in (q, p))
    beta, skew = settings.get("beta", 0.5), settings.get("skew", 0.1)
    if name == "dkd":
        values = []
        for i, label in enumerate(labels):
            others = [c for c in range(p.shape[-1]) if c != label]
            binary = [torch.stack([each[i, label], each[i, others].sum()]) for each in (p, q)]
            rest = [each[i, others] / each[i, others].sum() for each in (p, q)]
            values.append(settings.get("alpha", 1.0) * kl(*binary) + settings.get("beta", 8.0) * kl(*rest))
        return T**2 * torch.stack(values)
    m = beta * p + (1 - beta) * q
    return (
        T**2
        * {
            "forward_kl": lambda: kl(p, q),
            "reverse_kl": lambda: kl(q, p),
            "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m),
            "skew_kl": lambda: kl(p, skew * p + (1 - skew) * q),
            "skew_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
            "tvd": lambda: (p - q).abs().sum(-1) / 2,
            "mse": lambda: ((z - t) / T).square().sum(-1),
            "probability_mse": lambda: (p - q).square().sum(-1),
            "huber": lambda: huber_loss(z / T, t / T, reduction="none", delta=settings.get("delta", 1.0)).sum(-1),
        }[name]()
    )


def expected_of(name: str, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
    z, t = logits(0, 7, CLASSES).requires_grad_(), logits(1, 7, CLASSES)
    value = by_definition(name, z[:, LEFT], t[:, LEFT], settings, [LEFT.index(label) for label in LABELS.tolist()])
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


def test_every_divergence_is_here():
    assert SETTINGS.keys() == DIVERGENCES.keys()


@pytest.mark.parametrize("name, settings", CASES, ids=str)
def test_whole_logits_give_value_and_gradient_over_the_classes_that_are_left(name, settings):
    expected, slope = expected_of(name, settings)
    student, teacher = (masked(logits(seed, 7, CLASSES)).float() for seed in (0, 1))
    student.requires_grad_()
    labels = {"labels": LABELS} if name == "dkd" else {}
    value = logits_divergence(student, teacher, name, T, **settings, **labels)
    value.sum().backward()
    torch.testing.assert_close(value.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name, settings", CASES, ids=str)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_head_that_masks_by_its_bias_gives_the_same_in_chunks(name, settings, chunk):
    """The hidden states are the logits: the weight is the identity, and the bias masks."""
    expected, slope = expected_of(name, settings)
    hidden = logits(0, 7, CLASSES).float().requires_grad_()
    head = Head(torch.eye(CLASSES), masked(torch.zeros(CLASSES)))
    given = {"divergence": name, "settings": settings, "temperature": T, "chunk": chunk, "label_weight": 0.0}
    found = chunked(head, hidden, LABELS, head, logits(1, 7, CLASSES).float(), **given)
    found.total.backward()
    torch.testing.assert_close(found.logits.double(), expected.sum(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), slope, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in ("mse", "huber", "reverse_kl")])
def test_a_class_that_the_teacher_alone_masks_has_probability_0(name):
    """A logit of -200 in float64 is as good as none: the limit of ever lower logits."""
    z, t = logits(0, 7, CLASSES), logits(1, 7, CLASSES)
    far, settings = t.index_fill(-1, torch.tensor(MASKED), -200.0), {"labels": LABELS} if name == "dkd" else {}
    limit = z.clone().requires_grad_()
    value = by_definition(name, limit, far, {}, LABELS.tolist())
    slope = torch.autograd.grad(value.sum(), limit)[0]
    student = z.float().requires_grad_()
    found = logits_divergence(student, masked(t).float(), name, T, **settings)
    found.sum().backward()
    torch.testing.assert_close(found.double(), value.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(student.grad.double(), slope, rtol=1e-4, atol=1e-4)


def test_what_the_teacher_says_and_the_student_cannot_is_infinitely_far_and_no_nan():
    student, teacher = masked(logits(0, 7, CLASSES)).float(), logits(1, 7, CLASSES).float()
    for name, given in (
        ("forward_kl", (student, teacher)),
        ("reverse_kl", (teacher, student)),
        ("mse", (student, teacher)),
    ):
        assert (logits_divergence(*given, name) == math.inf).all(), name
    hidden = logits(0, 7, CLASSES).float()
    masking, whole = Head(torch.eye(CLASSES), masked(torch.zeros(CLASSES))), Head(torch.eye(CLASSES))
    found = chunked(masking, hidden, LABELS, whole, logits(1, 7, CLASSES).float(), label_weight=0.0)
    assert found.logits.item() == math.inf


def test_a_teacher_and_a_student_that_leave_the_true_class_alone_agree_in_dkd():
    only = torch.full((1, CLASSES), -math.inf).index_fill(-1, torch.tensor([2]), 1.0)
    student = only.clone().requires_grad_()
    value = logits_divergence(student, only, "dkd", labels=torch.tensor([2]))
    value.sum().backward()
    assert value.item() == 0 and not student.grad.any()


@pytest.mark.parametrize("k", [3, 6, 9])
def test_sparse_targets_give_value_and_gradient_over_the_classes_that_are_left(k):
    z, t = logits(0, 7, CLASSES).requires_grad_(), logits(1, 7, CLASSES)
    p = t[:, LEFT].softmax(-1)
    best = torch.stack([row.argsort(descending=True)[: min(k, len(LEFT))] for row in p])
    q = z[:, LEFT].softmax(-1)
    held = [each.gather(1, best) for each in (p, q)]
    rest = [(1 - each.sum(1)).clamp(min=0) for each in held]
    value = (torch.xlogy(held[0], held[0]) - held[0] * held[1].log()).sum(1)
    if k < len(LEFT):
        value = value + rest[0] * (rest[0] / rest[1]).log()
    slope = torch.autograd.grad(value.sum(), z)[0]
    probabilities, ids = masked(t).float().softmax(-1).topk(k)
    others = (1 - probabilities.sum(-1)).clamp(min=0) if k < len(LEFT) else torch.zeros(7)
    student = masked(z.detach()).float().requires_grad_()
    found = sparse_forward_kl(student, SparseTargets(ids, probabilities, others, entropy_of(probabilities, others)))
    found.sum().backward()
    torch.testing.assert_close(found.double(), value.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.grad.double(), slope, rtol=1e-4, atol=1e-5)


def test_sparse_targets_outside_of_what_the_student_can_say_are_infinitely_far():
    student = torch.zeros(1, 4).index_fill(-1, torch.tensor([2, 3]), -math.inf)
    p, rest = torch.tensor([[0.5, 0.25]]), torch.tensor([0.25])
    inside = SparseTargets(torch.tensor([[0, 1]]), p, rest, torch.zeros(1))
    assert sparse_forward_kl(student, inside).item() == math.inf


def test_labels_and_calibration_compare_the_classes_that_are_left():
    z, t = logits(0, 7, CLASSES).requires_grad_(), logits(1, 7, CLASSES)
    true = -z[:, LEFT].log_softmax(-1)[range(7), [LEFT.index(label) for label in LABELS.tolist()]]
    for value, made in (
        (true.sum(), lambda own: label_loss(own, LABELS).sum()),
        (
            kl(t[:, LEFT].softmax(-1), z[:, LEFT].softmax(-1)).sum(),
            lambda own: calibration_divergences(masked(t).float(), own).sum(),
        ),
    ):
        slope = torch.autograd.grad(value, z)[0]
        student = masked(z.detach()).float().requires_grad_()
        found = made(student)
        found.backward()
        torch.testing.assert_close(found.double(), value.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(student.grad.double(), slope, rtol=1e-4, atol=1e-5)
