"""Forward KL of a sample: its cross-entropy with the student less the stored one with the teacher it was drawn from."""

import pytest
import torch
from builders.caches import causal_model, pad, sequences, write
from builders.heads import chunked

from distill_llm.losses.head import Head
from distill_llm.losses.items import targets
from distill_llm.losses.sparse import SparseTargets, entropy_of, sparse_cross_entropy, sparse_forward_kl
from distill_llm.teachers.cache import CachedTeacher
from distill_llm.teachers.cache_coding import ItemCoding
from distill_llm.teachers.online import OnlineTeacher

CLASSES, K, SAMPLES = 30, 5, 4000
HALF = 2**-11  # the most that rounding to fp16 changes, relatively


def samples(logits, k=K, count=SAMPLES):
    """`count` samples of one item's logits (V,), as they come back from the bytes of a block."""
    coding = ItemCoding(len(logits), k, "sampled")
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64).numpy()
    block = coding.join(coding.encode(logits.expand(count, -1), uniforms))
    return coding.decode(coding.split(torch.frombuffer(bytearray(block), dtype=torch.uint8).numpy(), count))


def models(distance):
    """One item's logits of a teacher, and of a student that is `distance` away from it."""
    generator = torch.Generator().manual_seed(0)
    teacher = 2 * torch.randn(CLASSES, generator=generator)
    return teacher, teacher + distance * torch.randn(CLASSES, generator=generator)


def exact_kl(student, teacher):
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (teacher, student))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("distance", [0.0, 0.3, 3.0])
def test_the_mean_over_samples_is_the_kl_over_the_whole_vocabulary(distance):
    teacher, student = models(distance)
    drawn = samples(teacher)
    expanded = student.expand(SAMPLES, -1)
    found = sparse_forward_kl(expanded, drawn).double()
    error = found.std() / SAMPLES**0.5
    expected, rounding = exact_kl(student, teacher), HALF * drawn.teacher_nll.max()
    assert (found.mean() - expected).abs() < 4 * error + rounding
    of_samples = sparse_cross_entropy(expanded, drawn) - entropy_of(drawn.probabilities, drawn.rest)
    assert of_samples.mean() - expected > 5 * (4 * error + rounding), "the samples' own entropy is what is wrong"


def test_the_chunked_head_reports_the_same_values():
    teacher, student = models(0.3)
    drawn, one = samples(teacher), torch.ones(SAMPLES, 1)
    found = chunked(Head(student[:, None]), one, targets=drawn, chunk=700).logits
    torch.testing.assert_close(found, sparse_forward_kl(student.expand(SAMPLES, -1), drawn).sum())


def test_a_student_that_is_the_teacher_has_no_divergence_whatever_was_drawn():
    teacher, _ = models(0.0)
    drawn = samples(teacher)
    found = sparse_forward_kl(teacher.expand(SAMPLES, -1), drawn)
    assert found.abs().max() <= HALF * drawn.teacher_nll.max() + 1e-6


def test_what_is_subtracted_is_without_effect_on_the_gradient():
    teacher, student = models(0.3)
    drawn, gradients = samples(teacher), []
    for nll in (drawn.teacher_nll, torch.zeros(SAMPLES)):
        logits = student.repeat(SAMPLES, 1).requires_grad_()
        sparse_forward_kl(logits, drawn._replace(teacher_nll=nll)).sum().backward()
        weight = student[:, None].clone().requires_grad_()
        chunked(Head(weight), torch.ones(SAMPLES, 1), targets=drawn._replace(teacher_nll=nll)).total.backward()
        gradients.append((logits.grad, weight.grad))
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_a_cache_holds_the_cross_entropy_of_its_draws_with_the_teacher(tmp_path):
    model, data = causal_model(), sequences()
    write(tmp_path / "cache", model, data)
    batch = pad(list(data))
    positions, _ = targets(batch, "next_token")
    log_p = OnlineTeacher(model).signals(batch, positions=positions).logits.double().log_softmax(-1)
    stored = CachedTeacher(tmp_path / "cache").signals(batch, positions=positions).targets
    expected = -(stored.probabilities * log_p.gather(1, stored.ids)).sum(-1)
    torch.testing.assert_close(stored.teacher_nll.double(), expected, rtol=1.01 * HALF, atol=1e-6)


@pytest.mark.parametrize("offset", [0.0, -1000.0])
@pytest.mark.parametrize("classes", [7, 151_936])
def test_values_of_all_sizes_come_back(classes, offset):
    """One token has odds of e^gap to each other one: from no doubt at all to the largest entropy."""
    for gap in (0.0, 5.0, 12.0, 20.0, 200.0):
        logits = torch.zeros(classes, dtype=torch.float64)
        logits[3] = gap
        log_p = logits.log_softmax(-1)
        drawn = samples(logits.float() + offset, count=1)
        expected = -(drawn.probabilities[0] * log_p[drawn.ids[0].long()]).sum()
        # A processor that adds 8 numbers at a time is off by 4e-5 in the log of a sum of 151,936.
        torch.testing.assert_close(drawn.teacher_nll[0].double(), expected, rtol=1.1 * HALF, atol=1e-4)
        assert drawn.teacher_nll[0] >= 0


def test_a_top_k_keeps_the_entropy_of_its_own_outcomes():
    teacher, _ = models(0.0)
    coding = ItemCoding(CLASSES, K, "topk")
    stored: SparseTargets = coding.decode(coding.encode(teacher[None], None))
    p = torch.cat([stored.probabilities[0], stored.rest]).double()
    torch.testing.assert_close(stored.teacher_nll[0].double(), -torch.xlogy(p, p).sum(), rtol=1e-6, atol=1e-6)
