import pytest
import torch

from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.sparse import (
    SparseTargets,
    entropy_of,
    sparse_cross_entropy,
    sparse_forward_kl,
    value_and_grad,
)


def random_logits(items=7, vocabulary=40, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(items, vocabulary, generator=generator, dtype=torch.float64).mul(3).to(dtype)


def top_targets(teacher, k):
    p, ids = teacher.softmax(-1).topk(k)
    rest = (1 - p.sum(-1)).clamp(min=0)
    return SparseTargets(ids, p, rest, entropy_of(p, rest))


def dense_of(student, targets):
    """The same loss by brute force: loops over items and tokens, the rest as one probability."""
    values = []
    for z, ids, p, rest, _ in zip(student, *targets, strict=True):
        q = z.softmax(-1)
        held = {int(i): float(v) for i, v in zip(ids, p, strict=True) if v > 0}
        outside = q[[j for j in range(len(q)) if j not in held]].sum()
        values.append(sum(-v * q[i].log() for i, v in held.items()) - (rest * outside.log() if rest > 0 else 0))
    return torch.stack(values)


def test_all_tokens_give_the_dense_forward_kl_and_its_gradient():
    teacher, student = random_logits(seed=1), random_logits(seed=2)
    ours, dense = student.clone().requires_grad_(), student.clone().requires_grad_()
    value = sparse_forward_kl(ours, top_targets(teacher, teacher.shape[1]))
    expected = logits_divergence(dense, teacher, "forward_kl")
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, dense.grad, atol=1e-6, rtol=1e-5)


def test_top_k_with_the_rest_is_what_brute_force_says():
    teacher, student = random_logits(seed=1, dtype=torch.float64), random_logits(seed=2, dtype=torch.float64)
    targets = top_targets(teacher, 5)
    ours, brute = student.clone().requires_grad_(), student.clone().requires_grad_()
    value, expected = sparse_cross_entropy(ours, targets), dense_of(brute, targets)
    torch.testing.assert_close(value, expected)
    weights = torch.arange(1.0, 8.0, dtype=torch.float64)
    (value * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, brute.grad)


def test_the_value_and_gradient_of_chunks_are_those_of_the_whole():
    teacher, student = random_logits(seed=1), random_logits(seed=2).requires_grad_()
    targets = top_targets(teacher, 5)
    sparse_cross_entropy(student, targets).sum().backward()
    parts = [value_and_grad(student.detach()[at], targets.rows(at)) for at in (slice(0, 3), slice(3, 7))]
    torch.testing.assert_close(
        torch.cat([value for value, _ in parts]), sparse_cross_entropy(student.detach(), targets)
    )
    torch.testing.assert_close(torch.cat([gradient for _, gradient in parts]), student.grad)
    assert value_and_grad(student.detach(), targets, with_grad=False)[1] is None


def test_the_gradient_is_that_of_finite_differences():
    targets = top_targets(random_logits(3, 9, 1, torch.float64), 4)
    student = random_logits(3, 9, 2, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: sparse_forward_kl(logits, targets), student)


@pytest.mark.parametrize("padding_id", [0, 3, 39])
def test_padding_counts_for_nothing_whatever_token_it_names(padding_id):
    teacher, student = random_logits(seed=1), random_logits(seed=2)
    targets = top_targets(teacher, 5)
    padded = SparseTargets(
        torch.nn.functional.pad(targets.ids, (0, 3), value=padding_id),
        torch.nn.functional.pad(targets.probabilities, (0, 3)),
        targets.rest,
        targets.teacher_nll,
    )
    for ours, expected in zip(value_and_grad(student, padded), value_and_grad(student, targets), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("gap", [-80.0, -20.0, 20.0, 80.0, 1000.0])
def test_nothing_cancels_where_the_student_gives_the_rest_nearly_all_or_nothing(gap):
    student = random_logits(seed=2)
    targets = top_targets(random_logits(seed=1), 5)
    student.scatter_add_(1, targets.ids, torch.full_like(targets.probabilities, gap))
    exact = student.double().requires_grad_()
    others = exact.scatter(1, targets.ids, -torch.inf).logsumexp(-1) - exact.logsumexp(-1)
    expected = -(targets.probabilities * exact.log_softmax(-1).gather(1, targets.ids)).sum(-1) - targets.rest * others
    expected.sum().backward()
    value, gradient = value_and_grad(student, targets)
    torch.testing.assert_close(value, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, exact.grad.float(), rtol=1e-4, atol=1e-5)


def test_the_loss_is_least_where_the_student_is_the_teacher():
    teacher = random_logits(seed=1)
    student, targets = teacher.clone().requires_grad_(), top_targets(teacher, 5)
    value = sparse_forward_kl(student, targets)
    torch.testing.assert_close(value, torch.zeros(7), atol=2e-6, rtol=0)
    value.sum().backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), atol=2e-6, rtol=0)


def test_half_precision_logits_are_reduced_in_fp32():
    student, targets = random_logits(seed=2).bfloat16().requires_grad_(), top_targets(random_logits(seed=1), 5)
    value = sparse_cross_entropy(student, targets)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, sparse_cross_entropy(student.detach().float(), targets))
    value.sum().backward()
    assert student.grad.dtype == torch.bfloat16


def test_no_items_give_no_values_and_a_gradient():
    student = torch.empty(0, 9, requires_grad=True)
    targets = SparseTargets(torch.empty(0, 2, dtype=torch.long), torch.empty(0, 2), torch.empty(0), torch.empty(0))
    sparse_forward_kl(student, targets).sum().backward()
    assert student.grad.shape == (0, 9)
