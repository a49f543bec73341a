"""Losses over chunks of two tokenizers, against hand computations on texts of a few tokens."""

import math

import pytest
import torch

from distill_llm.common.errors import InputError
from distill_llm.losses.cross_tokenizer import (
    chunk_divergence,
    chunk_log_probabilities,
    shared_divergence,
    sorted_distance,
)
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.signals import Batch, LinkedSignals, Links, Signals
from distill_llm.losses.terms.cross_tokenizer import CrossTokenizerLoss
from distill_llm.losses.terms.term import Gives, Use


def links(own, other, same, shared=((0, 0), (1, 2)), sizes=(4, 3), all_shared=False):
    return Links(
        torch.tensor(own, dtype=torch.long).reshape(-1, 3),
        torch.tensor(other, dtype=torch.long).reshape(-1, 3),
        torch.tensor(same, dtype=torch.bool),
        torch.tensor(shared).reshape(-1, 2),
        sizes,
        all_shared,
    )


def logits_of(probabilities):
    return torch.tensor(probabilities).log()


# The student has the tokens a b c d, the teacher a ab b (ids 0 1 2): `a` and `b` are shared.
# The text a|ab|b|a b ...: the student reads a a b b a b (6 tokens), the teacher a ab b ab (4 tokens).
STUDENT = [
    [0.5, 0.2, 0.2, 0.1],
    [0.4, 0.3, 0.2, 0.1],
    [0.1, 0.6, 0.2, 0.1],
    [0.25, 0.25, 0.25, 0.25],
    [0.7, 0.1, 0.1, 0.1],
    [0.3, 0.5, 0.1, 0.1],
]
TEACHER = [[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.3, 0.4], [0.1, 0.8, 0.1]]
OWN = [(0, 0, 0), (1, 0, 1), (2, 1, 1), (3, 1, 2), (4, 0, 3), (5, 1, 3)]
OTHER = [(0, 0, 0), (1, 1, 1), (2, 2, 2), (3, 1, 3)]
SAME = [True, False, True, False]


def batch_of(own=OWN, other=OTHER, same=SAME, **settings):
    student = logits_of(STUDENT).requires_grad_()
    target = LinkedSignals(logits=logits_of(TEACHER), links=links(own, other, same, **settings))
    return Batch(target, None, torch.ones(1, 7), student=Signals(logits=student)), student


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def test_a_text_of_six_tokens_by_hand():
    exact = kl([0.6, 0.1, 0.3], [0.5, 0.2, 0.3]) + kl([0.3, 0.4, 0.3], [0.25, 0.25, 0.5])  # a, b, anything else
    likelihood = kl([0.5, 0.5], [0.4 * 0.6, 1 - 0.4 * 0.6]) + kl([0.8, 0.2], [0.7 * 0.5, 1 - 0.7 * 0.5])
    ordered = (0.5 - 0.4) + 0.0 + 0.0 + 0.1 + (0.8 - 0.7) + 0.0 + 0.0 + 0.1
    batch, _ = batch_of()
    for settings, expected in (
        ({"likelihood": 0, "sorted": 0}, exact),
        ({"exact": 0, "sorted": 0}, likelihood),
        ({"exact": 0, "likelihood": 0}, ordered),
        ({"exact": 0.5, "likelihood": 2, "sorted": 0.25}, 0.5 * exact + 2 * likelihood + 0.25 * ordered),
    ):
        assert CrossTokenizerLoss(**settings).sum(batch, None, []).item() == pytest.approx(expected, rel=1e-5)


def test_the_chain_rule_multiplies_the_tokens_of_a_chunk():
    tokens = torch.tensor(OWN)
    found = chunk_log_probabilities(logits_of(STUDENT), tokens[:, 1], tokens[:, 2], 4)
    assert found.exp().tolist() == pytest.approx([0.5, 0.4 * 0.6, 0.25, 0.7 * 0.5])


def test_a_temperature_of_chunks_takes_the_root_of_their_probabilities():
    p, q = 0.25, 0.04
    found = chunk_divergence(torch.tensor([math.log(q)]), torch.tensor([math.log(p)]), 2.0)
    assert found.item() == pytest.approx(kl([0.5, 0.5], [0.2, 0.8]), rel=1e-5)
    certain = torch.zeros(1, requires_grad=True)  # both models are sure of the chunk
    value = chunk_divergence(certain, torch.zeros(1))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6) and certain.grad.isfinite().all()


def test_probabilities_are_compared_in_falling_order_and_a_small_vocabulary_is_filled_up():
    student, teacher = logits_of([[0.1, 0.9]]), logits_of([[0.2, 0.3, 0.5]])
    assert sorted_distance(student, teacher).item() == pytest.approx(0.4 + 0.2 + 0.2)
    assert sorted_distance(student, student.flip(-1)).item() == 0


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "skew_kl"])
def test_where_all_tokens_are_shared_the_value_is_that_of_logits_in_any_order(divergence):
    torch.manual_seed(0)
    student, teacher, order = torch.randn(5, 7), torch.randn(5, 7), torch.randperm(7)
    expected = logits_divergence(student, teacher, divergence, 2.0)
    alike = links([], [], [], [(at, at) for at in range(7)], (7, 7), all_shared=True)
    assert torch.equal(shared_divergence(student, teacher, alike, divergence, 2.0), expected)
    turned = links([], [], [], [(at, order.tolist().index(at)) for at in range(7)], (7, 7))
    found = shared_divergence(student, teacher[:, order], turned, divergence, 2.0)
    torch.testing.assert_close(found, expected)


def test_a_vocabulary_within_the_other_is_compared_over_its_tokens_alone():
    student, teacher = logits_of([[0.5, 0.5]]), logits_of([[0.2, 0.2, 0.6]])
    found = shared_divergence(student, teacher, links([], [], [], [(0, 0), (1, 1)], (2, 3)), "forward_kl", 1.0)
    assert found.item() == pytest.approx(0, abs=1e-6)


def test_a_sum_over_chunks_does_not_depend_on_how_they_are_divided():
    term = CrossTokenizerLoss(temperature=2.0, chunk_temperature=3.0)
    whole = term.sum(batch_of()[0], None, [])
    first = term.sum(batch_of(OWN[:3], OTHER[:2], SAME[:2])[0], None, [])
    rest = ([(item, token, chunk - 2) for item, token, chunk in each] for each in (OWN[3:], OTHER[2:]))
    second = term.sum(batch_of(*rest, SAME[2:])[0], None, [])
    torch.testing.assert_close(first + second, whole)


def test_without_any_chunk_the_loss_is_zero_and_still_a_part_of_the_graph():
    batch, student = batch_of([], [], [])
    loss = CrossTokenizerLoss().sum(batch, None, [])
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"divergence": "mse"}, r"losses.cross_tokenizer.divergence: got 'mse'; .*forward_kl"),
        ({"divergence": "dkd"}, r"losses.cross_tokenizer.divergence: got 'dkd'; .*forward_kl"),
        ({"exact": 0, "likelihood": 0, "sorted": 0}, r"losses.cross_tokenizer.exact: .*at least one share above 0"),
        ({"chunk_temperature": 0}, r"losses.cross_tokenizer.chunk_temperature"),
    ],
)
def test_settings_that_make_no_loss_are_refused(settings, line):
    with pytest.raises(InputError, match=line):
        parse_objective({"cross_tokenizer": settings})


def test_it_needs_a_teacher_with_links_and_other_terms_need_another_teacher():
    objective = parse_objective({"cross_tokenizer": {}, "logits": {}, "labels": {}})
    plain, linked = Gives("a model", ("logits", "hidden")), Gives("another tokenizer", ("linked",))
    assert [fault.field for fault in objective.faults(Use(teacher=plain))] == ["losses.cross_tokenizer"]
    assert [fault.field for fault in objective.faults(Use(teacher=linked))] == ["losses.logits"]
    (fault,) = parse_objective({"cross_tokenizer": {}}).faults(Use(kind="token"))
    assert "a causal language model" in str(fault)
