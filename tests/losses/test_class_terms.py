"""Terms and divergences of classes against plain formulas, item by item, in float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import torch
from builders.trainers import assert_same_step, both_ways, causal_model, rows

from distill_llm.losses.calibration import calibrating_temperature
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.signals import Batch, Signals
from distill_llm.losses.terms.focal import FocalLoss
from distill_llm.losses.terms.own_temperature import OwnTemperatureLoss, temperature_of
from distill_llm.losses.terms.ranking import RankingLoss
from distill_llm.losses.terms.smoothing import SmoothingLoss
from distill_llm.losses.terms.term import Use

RANDOM = np.random.default_rng(0)
STUDENT, TEACHER = (3 * RANDOM.normal(size=(6, 8)) for _ in range(2))


def tensors(*arrays):
    return [torch.tensor(each, dtype=torch.float64) for each in arrays]


def kl(p, q):
    return scipy.special.rel_entr(p, q).sum(-1)


def softmax(z):
    return scipy.special.softmax(z, axis=-1)


@pytest.mark.parametrize("top", [1, 3, 8, 20])
def test_ranking_is_a_mean_of_hinges_over_pairs(top):
    expected = []
    for s, t in zip(STUDENT, TEACHER, strict=True):
        best = sorted(range(8), key=lambda c: -t[c])[:top]
        rest = [s[c] for c in range(8) if c not in best]
        hinges = [max(0.0, 1.5 - (s[a] - s[b])) for place, a in enumerate(best) for b in best[place + 1 :]]
        hinges += [max(0.0, 1.5 - (s[a] - max(rest))) for a in best if rest]
        expected.append(np.mean(hinges))
    found = RankingLoss(top=top, margin=1.5).of_items(*tensors(STUDENT, TEACHER))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_classes_that_are_masked_count_in_no_pair_and_give_no_bad_slope():
    student, teacher = tensors(STUDENT, TEACHER)
    student[:, :2], teacher[:, :2] = -math.inf, -math.inf
    student.requires_grad_()
    own = [(OwnTemperatureLoss(by=by), OwnTemperatureLoss(by=by)) for by in ("spread", "entropy")]
    for term, kept in ((RankingLoss(top=7), RankingLoss(top=6)), *own):
        values = term.of_items(student, teacher)
        torch.testing.assert_close(values, kept.of_items(student[:, 2:], teacher[:, 2:]))
        (slope,) = torch.autograd.grad(values.sum(), student)
        assert slope.isfinite().all()


def test_a_class_that_only_the_teacher_masks_counts_in_no_pair_though_it_is_among_the_top_ones():
    """Of four classes the teacher masks two, so one of its top three is masked: the student's logit of it is small."""
    student, teacher = tensors([[1.0, 3.0, -7.0, 2.5]], [[2.0, 1.0, -math.inf, -math.inf]])
    for masked in (2, 3):  # whichever of the two comes third
        turned = student.clone()
        turned[0, 2], turned[0, 3] = (-7.0, 2.5) if masked == 2 else (2.5, -7.0)
        top = teacher.topk(3).indices[0].tolist()
        (rest,) = {0, 1, 2, 3} - {*top}
        hinges = [1.0 - (1.0 - 3.0), *(max(0.0, 1.0 - (own - turned[0, rest].item())) for own in (1.0, 3.0))]
        found = RankingLoss(top=3, margin=1.0).of_items(turned, teacher)
        assert found.item() == pytest.approx(sum(hinges) / 3)


@pytest.mark.parametrize("by", ["doubt", "confidence"])
def test_focal_weighs_the_divergence_by_the_teachers_largest_probability(by):
    sure = softmax(TEACHER).max(-1)
    weight = (sure if by == "confidence" else 1 - sure) ** 1.5
    expected = weight * 4 * kl(softmax(TEACHER / 2), softmax(STUDENT / 2))
    found = FocalLoss(by=by, gamma=1.5, temperature=2.0).of_items(*tensors(STUDENT, TEACHER))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_a_temperature_of_its_own_by_the_spread_of_the_logits():
    z, t = ((each - each.mean(-1, keepdims=True)) / each.std(-1, keepdims=True) / 3 for each in (STUDENT, TEACHER))
    found = OwnTemperatureLoss(temperature=3.0).of_items(*tensors(STUDENT, TEACHER))
    np.testing.assert_allclose(found, 9 * kl(softmax(t), softmax(z)), rtol=1e-4)
    shifted = OwnTemperatureLoss(temperature=3.0).of_items(*tensors(7 * TEACHER + 2, TEACHER))
    np.testing.assert_allclose(shifted, 0, atol=1e-6)  # scale and place of the logits do not matter


def test_a_temperature_of_its_own_by_the_entropy_of_the_teacher():
    def lacking(log, t):
        p = softmax(t / np.exp(log))
        return scipy.special.entr(p).sum() - 0.7 * np.log(8)

    own = np.array([np.exp(scipy.optimize.brentq(lacking, -5, 5, args=(t,))) for t in TEACHER])
    np.testing.assert_allclose(temperature_of(*tensors(TEACHER), 0.7), own, rtol=1e-6)
    expected = own**2 * kl(softmax(TEACHER / own[:, None]), softmax(STUDENT / own[:, None]))
    found = OwnTemperatureLoss(by="entropy", entropy=0.7).of_items(*tensors(STUDENT, TEACHER))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_labels_are_smoothed_as_far_as_the_teacher_is_unsure():
    labels = np.array([0, 3, -100, 7, 2, 2])
    expected = 0.0
    for s, t, label in zip(STUDENT, TEACHER, labels, strict=True):
        if label == -100:
            continue
        doubt = 1 - softmax(t / 1.7).max()
        target = np.full(8, doubt / 8)
        target[label] += 1 - doubt
        expected -= target @ scipy.special.log_softmax(s)
    student, teacher = (Signals(logits=each) for each in tensors(STUDENT, TEACHER))
    batch = Batch(teacher, torch.tensor(labels), torch.ones(6, 1), student=student)
    match = type("Match", (), {"classes": None})()
    assert float(SmoothingLoss(temperature=1.7).sum(batch, match, [])) == pytest.approx(expected, rel=1e-5)


def test_the_calibrating_temperature_has_the_largest_likelihood():
    logits = 5 * RANDOM.normal(size=(400, 5))
    labels = np.array([RANDOM.choice(5, p=p) for p in softmax(logits / 2.5)])

    def loss(log):
        return -scipy.special.log_softmax(logits / np.exp(log), axis=-1)[np.arange(400), labels].mean()

    best = np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-3, 3), method="bounded", options={"xatol": 1e-9}).x)
    found = calibrating_temperature(torch.tensor(logits), torch.tensor(labels))
    assert found == pytest.approx(best, rel=1e-5) and 2 < found < 3.2


def test_squared_probabilities_tend_to_squared_logits_as_the_temperature_grows():
    """The gradient's distance from 2 (z - t, each less its mean) / C^2 falls as 1 / T; at T = 1 it is far from it."""
    z, t = (each - each.mean(-1, keepdims=True) for each in (STUDENT, TEACHER))
    limit = 2 * (z - t) / 8**2
    errors = []
    for temperature in (1.0, 10.0, 100.0, 1000.0):
        student = torch.tensor(STUDENT, requires_grad=True)
        p, q = ((each / temperature).softmax(-1) for each in (torch.tensor(TEACHER), student))
        value = temperature**2 * (p - q).square().sum(-1)
        (exact,) = torch.autograd.grad(value.sum(), student)
        errors.append(np.abs(exact.numpy() - limit).max() / np.abs(limit).max())
        ours = torch.tensor(STUDENT, dtype=torch.float32, requires_grad=True)
        loss = logits_divergence(ours, torch.tensor(TEACHER), "probability_mse", temperature)
        (slope,) = torch.autograd.grad(loss.sum(), ours)
        np.testing.assert_allclose(slope, exact, rtol=2e-2 if temperature > 100 else 2e-3, atol=2e-5)
    assert errors[0] > 0.5 and all(later < 0.15 * before for before, later in pairwise(errors[1:]))
    np.testing.assert_allclose(value.detach(), ((z - t) ** 2).sum(-1) / 64, rtol=2e-2)


def test_huber_is_half_the_square_and_then_linear():
    value = logits_divergence(torch.tensor([[0.0, 3.0, -1.0]]), torch.tensor([[0.5, 0.0, -1.0]]), "huber", delta=2.0)
    assert value.tolist() == [0.125 + 2 * (3 - 1)]
    warm = logits_divergence(torch.tensor([[3.0]]), torch.tensor([[0.0]]), "huber", 3.0, delta=1.0)
    assert warm.tolist() == [4.5]  # half the square of a difference of 3, which over 3 is within 1


NEW = {
    "ranking": {"ranking": {"top": 3}},
    "focal": {"focal": {"temperature": 2.0}},
    "spread": {"own_temperature": {}},
    "entropy": {"own_temperature": {"by": "entropy"}},
    "smoothing": {"smoothing": {}},
    "probability_mse": {"logits": {"divergence": "probability_mse", "temperature": 2.0}},
    "huber": {"logits": {"divergence": "huber", "delta": 0.5}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEW)
def test_a_language_model_learns_them_with_and_without_whole_logits_alike(tmp_path, monkeypatch, name):
    student, teacher = causal_model(layers=1), causal_model(layers=2, seed=1)
    assert_same_step(both_ways(monkeypatch, tmp_path, student, teacher, rows(student), NEW[name]), rtol=1e-3)


@pytest.mark.parametrize(
    "losses, words",
    [
        ({"ranking": {}}, "losses.ranking: got 'a single output'; remove it: a regression has no classes"),
        ({"smoothing": {}}, "losses.smoothing: got 'a single output'; remove it"),
        (
            {"logits": {"divergence": "forward_kl"}},
            "losses.logits.divergence: got 'forward_kl'; accepted: mse or huber",
        ),
    ],
)
def test_a_regression_has_no_classes(losses, words):
    (fault,) = parse_objective(losses).faults(Use(single_output=True))
    assert words in str(fault)
