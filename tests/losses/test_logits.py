"""Divergences of outputs against scipy, plain float64 formulas and hand computation."""

import math

import pytest
import scipy.special
import torch

from distill_llm.losses import logits_divergence
from distill_llm.losses.divergences import DIVERGENCES
from distill_llm.losses.logits import coarsened

LABELS = torch.tensor([3, 0, -100, 6, 1])
KL = scipy.special.rel_entr


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def own_settings(divergence: str, count: int = 5) -> dict:
    return {"labels": LABELS[:count]} if divergence == "dkd" else {}


def plain(divergence, z, t, temperature=1.0, beta=None, skew=0.1, alpha=1.0, labels=LABELS):
    """The formulas of the papers on probabilities in float64; differentiable."""
    q, p = (z / temperature).softmax(-1), (t / temperature).softmax(-1)

    def kl(a, b):
        return (a * (a / b).log()).sum(-1)

    half = 0.5 if beta is None else beta
    m = half * p + (1 - half) * q
    if divergence == "dkd":
        values = []
        for i, label in enumerate(labels.tolist()):
            if label == -100:
                values.append(z[i].sum() * 0)
                continue
            others = [c for c in range(z.shape[-1]) if c != label]
            binary = [torch.stack([each[i, label], each[i, others].sum()]) for each in (p, q)]
            rest = [each[i, others] / each[i, others].sum() for each in (p, q)]
            values.append(alpha * kl(*binary) + (8.0 if beta is None else beta) * kl(*rest))
        return torch.stack(values) * temperature**2
    return {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: half * kl(p, m) + (1 - half) * kl(q, m),
        "skew_kl": lambda: kl(p, skew * p + (1 - skew) * q),
        "skew_reverse_kl": lambda: kl(q, (1 - skew) * p + skew * q),
        "tvd": lambda: (p - q).abs().sum(-1) / 2,
        "mse": lambda: ((z - t) / temperature).square().sum(-1),
        "probability_mse": lambda: (p - q).square().sum(-1),
        "huber": lambda: torch.nn.functional.huber_loss(z / temperature, t / temperature, reduction="none").sum(-1),
    }[divergence]() * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize(
    "divergence, settings",
    [
        *((name, {}) for name in DIVERGENCES),
        ("jsd", {"beta": 0.1}),
        ("skew_kl", {"skew": 0.4}),
        ("skew_reverse_kl", {"skew": 0.4}),
        ("dkd", {"alpha": 0.5, "beta": 2.0}),
    ],
)
def test_value_and_gradient_equal_the_papers_formula_with_squared_temperature(divergence, settings, temperature):
    student, teacher = random_logits(0, 5, 7).requires_grad_(), random_logits(1, 5, 7)
    expected = plain(divergence, student, teacher, temperature, **settings)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    single = student.detach().float().requires_grad_()
    value = logits_divergence(single, teacher.float(), divergence, temperature, **own_settings(divergence), **settings)
    value.sum().backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(single.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_skewed_and_generalised_divergences_of_two_classes_equal_scipys_relative_entropies():
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.4, 0.6]])
    skew, reverse, jsd = (
        logits_divergence(q.log(), p.log(), name, **own).item()
        for name, own in (("skew_kl", {}), ("skew_reverse_kl", {}), ("jsd", {"beta": 0.25}))
    )
    assert skew == pytest.approx(KL([0.9, 0.1], [0.45, 0.55]).sum(), rel=1e-5)
    assert reverse == pytest.approx(KL([0.4, 0.6], [0.85, 0.15]).sum(), rel=1e-5)
    m = [0.25 * 0.9 + 0.75 * 0.4, 0.25 * 0.1 + 0.75 * 0.6]
    assert jsd == pytest.approx(0.25 * KL([0.9, 0.1], m).sum() + 0.75 * KL([0.4, 0.6], m).sum(), rel=1e-5)
    assert logits_divergence(q.log(), p.log(), "tvd").item() == pytest.approx(0.5, rel=1e-6)


def test_jsd_tends_to_forward_and_reverse_kl_at_its_ends():
    student, teacher = random_logits(0, 4, 6).float(), random_logits(1, 4, 6).float()
    for beta, name, weight in ((1e-4, "forward_kl", 1e-4), (1 - 1e-4, "reverse_kl", 1e-4)):
        value = logits_divergence(student, teacher, "jsd", beta=beta) / weight
        torch.testing.assert_close(value, logits_divergence(student, teacher, name), rtol=2e-2, atol=1e-2)


def test_dkd_with_the_weights_that_plain_kl_has_is_plain_kl():
    student, teacher = random_logits(0, 1, 7).float(), random_logits(1, 1, 7).float()
    rest = 1 - teacher.softmax(-1)[0, 3].item()
    value = logits_divergence(student, teacher, "dkd", labels=LABELS[:1], alpha=1.0, beta=rest)
    torch.testing.assert_close(value, logits_divergence(student, teacher, "forward_kl"))


def test_dkd_stays_finite_and_exact_where_the_teacher_is_certain():
    teacher = torch.tensor([[60.0, 1.0, 0.0], [0.0, 60.0, 1.0]])
    student = torch.tensor([[0.0, 1.0, 2.0], [0.0, 60.0, 1.0]], requires_grad=True)
    value = logits_divergence(student, teacher, "dkd", labels=torch.tensor([0, 1]), beta=1.0)
    value.sum().backward()
    exact = plain("dkd", student.detach().double(), teacher.double(), beta=1.0, labels=torch.tensor([0]))
    assert value[0].item() == pytest.approx(exact[0].item(), rel=1e-5)
    assert value[1].item() == pytest.approx(0, abs=1e-6) and student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "divergence, top_k",
    [(d, k) for d, row in DIVERGENCES.items() for k in (None, 5) if k is None or "top_k" in row.settings],
)
def test_an_identical_model_gives_zero_and_no_gradient(divergence, top_k, dtype):
    teacher = (3 * random_logits(0, 5, 400)).to(dtype)
    student = teacher.clone().requires_grad_()
    value = logits_divergence(student, teacher, divergence, 2.0, top_k=top_k, **own_settings(divergence))
    value.sum().backward()
    assert value.abs().max() < 1e-5
    assert student.grad.abs().max() < 1e-5


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "mse"])
def test_bf16_logits_near_convergence_give_a_value_above_zero_and_the_fp64_gradient(divergence):
    teacher = random_logits(0, 5, 500).bfloat16()
    student = (teacher.float() + 0.02 * random_logits(1, 5, 500).float()).bfloat16().requires_grad_()
    value = logits_divergence(student, teacher, divergence, **own_settings(divergence))
    value.sum().backward()
    exact = student.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(plain(divergence, exact, teacher.double()).sum(), exact)
    assert value.min() >= 0
    assert (student.grad.double() - expected).norm() / expected.norm() < 0.01


@pytest.mark.parametrize("divergence", [name for name, row in DIVERGENCES.items() if "top_k" in row.settings])
def test_top_k_compares_the_teachers_k_likeliest_classes_and_the_mass_of_all_others(divergence):
    student, teacher = random_logits(0, 5, 7).requires_grad_(), random_logits(1, 5, 7)
    q, p = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    best = p.argsort(-1, descending=True)[:, :3]
    merged = [
        torch.cat([each.gather(-1, best), 1 - each.gather(-1, best).sum(-1, keepdim=True)], -1) for each in (q, p)
    ]
    expected = 4 * plain(divergence, *(each.log() for each in merged))
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    single = student.detach().float().requires_grad_()
    value = logits_divergence(single, teacher.float(), divergence, 2.0, top_k=3)
    value.sum().backward()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(single.grad.double(), gradient, rtol=1e-4, atol=1e-6)
    full = logits_divergence(single, teacher.float(), divergence, 2.0)
    assert (value <= full + 1e-6).all()
    for k in (7, 100):
        assert torch.equal(logits_divergence(single, teacher.float(), divergence, 2.0, top_k=k), full)


def test_top_k_sees_what_a_renormalised_one_cannot_mass_outside_of_the_k_classes():
    teacher = torch.tensor([[0.6, 0.399, 0.0005, 0.0005]]).log()
    student = torch.tensor([[0.3, 0.1995, 0.25025, 0.25025]]).log()
    value = logits_divergence(student, teacher, "forward_kl", top_k=2).item()
    assert value == pytest.approx(KL([0.6, 0.399, 0.001], [0.3, 0.1995, 0.5005]).sum(), rel=1e-4)


def test_the_rest_keeps_its_digits_where_almost_all_mass_is_inside():
    teacher = torch.tensor([[40.0, 20.0, 0.0, 0.0]])
    merged, _ = coarsened(teacher, teacher, 2)
    assert merged[0, 2].item() == pytest.approx(math.log(2) - 40, rel=1e-6)
