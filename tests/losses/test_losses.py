"""The losses against hand computation, plain formulas in float64 and autograd."""

import math

import pytest
import torch

from distill_llm.common.errors import InputError
from distill_llm.losses import (
    AttentionInputs,
    attention_distance,
    hidden_distance,
    label_loss,
    logits_divergence,
)
from distill_llm.losses.attention import BLOCK

P, Q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])


def random_logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    "divergence, expected",
    [
        ("forward_kl", 0.5 * math.log(2) - 0.25 * math.log(2)),
        ("reverse_kl", 0.5 * math.log(2) - 0.25 * math.log(2)),
        ("jsd", 0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)),
        ("mse", 2 * math.log(2) ** 2),
    ],
)
def test_divergence_of_three_classes_equals_the_hand_computed_value(divergence, expected):
    value = logits_divergence(Q.log()[None], P.log()[None], divergence)
    assert value.shape == (1,)
    assert value.item() == pytest.approx(expected, rel=1e-5)


def test_forward_and_reverse_kl_differ_where_the_distributions_are_not_mirrored():
    teacher, student = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.5, 0.5]]).log()
    forward = logits_divergence(student, teacher, "forward_kl").item()
    reverse = logits_divergence(student, teacher, "reverse_kl").item()
    assert forward == pytest.approx(0.9 * math.log(1.8) + 0.1 * math.log(0.2), rel=1e-5)
    assert reverse == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergence_and_gradient_equal_float64_formulas_with_squared_temperature(divergence, temperature):
    student, teacher = random_logits(0, 5, 7).requires_grad_(), random_logits(1, 5, 7)
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    m = (p + q) / 2
    expected = {
        "forward_kl": (p * (p / q).log()).sum(-1),
        "reverse_kl": (q * (q / p).log()).sum(-1),
        "jsd": ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2,
    }[divergence] * temperature**2
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    single = student.detach().float().requires_grad_()
    value = logits_divergence(single, teacher.float(), divergence, temperature)
    value.sum().backward()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(single.grad.double(), gradient, rtol=1e-4, atol=1e-6)


def test_forward_kl_gradient_keeps_its_size_at_high_temperature():
    student, teacher = random_logits(0, 4, 6).float().requires_grad_(), random_logits(1, 4, 6).float()
    sizes = []
    for temperature in (50.0, 100.0):
        (gradient,) = torch.autograd.grad(logits_divergence(student, teacher, "forward_kl", temperature).sum(), student)
        sizes.append(gradient.norm().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_divergence_near_convergence_in_bf16_is_not_negative_and_has_the_fp32_gradient(divergence):
    teacher = random_logits(0, 16, 500).bfloat16()
    student = (teacher.float() + 0.02 * random_logits(1, 16, 500).float()).bfloat16().requires_grad_()
    value = logits_divergence(student, teacher, divergence)
    value.sum().backward()
    exact = student.detach().double().requires_grad_()
    log_p, log_q = teacher.double().log_softmax(-1), exact.log_softmax(-1)
    log_m = torch.logsumexp(torch.stack([log_p, log_q]), 0) - math.log(2)
    pairs = {"forward_kl": [(log_p, log_q)], "reverse_kl": [(log_q, log_p)], "jsd": [(log_p, log_m), (log_q, log_m)]}
    total = sum((a.exp() * (a - b)).sum() for a, b in pairs[divergence]) / len(pairs[divergence])
    (expected,) = torch.autograd.grad(total, exact)
    assert value.min() >= 0
    error = (student.grad.double() - expected).norm() / expected.norm()
    assert error < 0.01


def test_label_loss_equals_minus_log_probability_and_skips_ignored_items():
    logits = torch.stack([P.log(), Q.log(), P.log()])
    loss = label_loss(logits, torch.tensor([0, 1, -100]))
    torch.testing.assert_close(loss, torch.tensor([math.log(2), math.log(4), 0.0]))


def test_label_smoothing_spreads_the_target_over_the_classes():
    loss = label_loss(P.log()[None], torch.tensor([0]), smoothing=0.3)
    expected = -(0.7 * math.log(0.5) + 0.1 * (math.log(0.5) + 2 * math.log(0.25)))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_label_loss_of_regression_is_the_squared_error():
    loss = label_loss(torch.tensor([[1.0], [2.5]]), torch.tensor([3.0, 2.0]))
    torch.testing.assert_close(loss, torch.tensor([4.0, 0.25]))
    whole = label_loss(torch.tensor([[1.0], [2.5]]), torch.tensor([3, -100]))
    torch.testing.assert_close(whole, torch.tensor([4.0, 0.0]))


def test_floats_as_labels_of_several_classes_are_refused():
    with pytest.raises(InputError, match="class ids"):
        label_loss(torch.zeros(2, 3), torch.zeros(2, 3))


def test_hidden_mse_is_the_mean_over_channels_and_cosine_one_minus_the_cosine():
    student, teacher = torch.tensor([[[1.0, 0.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 2.0], [6.0, 8.0]]])
    torch.testing.assert_close(hidden_distance(student, teacher), torch.tensor([[2.5, 12.5]]))
    torch.testing.assert_close(hidden_distance(student, teacher, "cosine"), torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(hidden_distance(student, teacher, "normalized_mse"), torch.tensor([[5 / 4, 25 / 100]]))
    zeros = torch.zeros(1, 1, 2)
    assert hidden_distance(zeros, zeros, "normalized_mse").item() == 0


@pytest.mark.parametrize("distance", ["mse", "cosine", "normalized_mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_distance_and_gradient_equal_float64_formulas(distance, dtype):
    student, teacher = random_logits(0, 2, 3, 8).to(dtype).requires_grad_(), random_logits(1, 2, 3, 8).to(dtype)
    weight = random_logits(2, 2, 3).float()
    value = hidden_distance(student, teacher, distance)
    (gradient,) = torch.autograd.grad((value * weight).sum(), student)
    exact, target = student.detach().double().requires_grad_(), teacher.double()
    expected = (exact - target).pow(2).mean(-1)
    if distance == "cosine":
        expected = 1 - (exact * target).sum(-1) / exact.norm(dim=-1) / target.norm(dim=-1)
    if distance == "normalized_mse":
        expected = (exact - target).pow(2).sum(-1) / target.pow(2).sum(-1)
    (wanted,) = torch.autograd.grad((expected * weight).sum(), exact)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    accuracy = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    torch.testing.assert_close(gradient.double(), wanted, **accuracy)


@pytest.mark.parametrize("length", [5, 20])  # rows shorter and longer than a vector register
def test_attention_kl_stays_exact_for_sharp_maps_and_one_visible_key(length):
    student, teacher, valid = attention_case((3, 3), length=length)
    student, teacher = student._replace(scaling=40.0), teacher._replace(scaling=35.0)
    value = attention_distance(student, teacher, valid)
    exact = [each._replace(query=each.query.double(), key=each.key.double()) for each in (student, teacher)]
    p, q = ((each.scaling * each.query @ each.key.mT + each.bias).log_softmax(-1) for each in exact[::-1])
    expected = ((p.exp() * (p - q)).sum(-1).mean(1) * valid).sum()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    alone = torch.full((2, 1, 1, length), torch.finfo(torch.float32).min)
    alone[..., 0] = 0
    zero = attention_distance(student._replace(bias=alone), teacher._replace(bias=alone), valid)
    assert zero.item() == pytest.approx(0, abs=1e-4)


def attention_case(
    heads: tuple[int, int], dtype=torch.float32, length=5
) -> tuple[AttentionInputs, AttentionInputs, torch.Tensor]:
    valid = torch.tensor([[1] * length, [1, 1, 1] + [0] * (length - 3)])
    bias = torch.zeros(2, 1, 1, length).masked_fill(valid[:, None, None, :] == 0, torch.finfo(torch.float32).min)

    def inputs(seed: int, count: int, size: int) -> AttentionInputs:
        query, key = random_logits(seed, 2, 2, count, length, size).to(dtype)
        return AttentionInputs(query.requires_grad_(), key.requires_grad_(), 0.7, bias)

    return inputs(0, heads[0], 4), inputs(1, heads[1], 6), valid


def plain_attention_distance(student, teacher, valid, distance):
    """Loops over examples, queries and heads on probabilities of plain softmax."""
    total = 0.0
    for example in range(len(valid)):
        keys = valid[example].bool()
        maps = []
        for inputs in (student, teacher):
            scores = inputs.scaling * inputs.query[example] @ inputs.key[example].transpose(-1, -2)
            maps.append(scores[..., keys].softmax(-1))
        if maps[0].shape[0] != maps[1].shape[0]:
            maps = [each.mean(0, keepdim=True) for each in maps]
        q, p = maps
        value = (p * (p / q).log()) if distance == "kl" else (p - q) ** 2
        total = total + value.sum(-1).mean(0)[keys].sum()
    return total


@pytest.mark.parametrize("distance", ["kl", "mse"])
@pytest.mark.parametrize("heads", [(3, 3), (2, 3)])
@pytest.mark.parametrize("length", [5, 20])
def test_attention_distance_and_gradients_equal_plain_autograd_without_padding(distance, heads, length):
    student, teacher, valid = attention_case(heads, length=length)
    value = attention_distance(student, teacher, valid, distance)
    gradients = torch.autograd.grad(3 * value, [student.query, student.key])
    expected = plain_attention_distance(student, teacher, valid, distance)
    torch.testing.assert_close(value, expected)
    for found, wanted in zip(gradients, torch.autograd.grad(3 * expected, [student.query, student.key]), strict=True):
        torch.testing.assert_close(found, wanted)
        assert found[1, :, 3:].abs().max() == 0


@pytest.mark.parametrize("limit", [1, 30, 60, 90], ids=["a head", "a head of 5", "two heads", "an example"])
@pytest.mark.parametrize("head_bias", [False, True])
def test_attention_kl_made_in_blocks_is_the_same(monkeypatch, limit, head_bias):
    student, teacher, valid = attention_case((3, 3), length=5)
    bias = student.bias
    if head_bias:  # as of relative positions
        bias = bias + random_logits(7, 1, 3, 5, 5)
    student, teacher = student._replace(bias=bias), teacher._replace(bias=bias)
    expected = attention_distance(student, teacher, valid)
    wanted = torch.autograd.grad(3 * expected, [student.query, student.key])
    monkeypatch.setitem(BLOCK, "cpu", limit)
    assert len(list(student.blocks())) == {1: 6, 30: 6, 60: 4, 90: 2}[limit]
    value = attention_distance(student, teacher, valid)
    torch.testing.assert_close(value, expected)
    for found, exact in zip(torch.autograd.grad(3 * value, [student.query, student.key]), wanted, strict=True):
        torch.testing.assert_close(found, exact)


def test_attention_kl_of_bf16_inputs_is_close_to_fp32():
    student, teacher, valid = attention_case((3, 3), torch.bfloat16)
    exact = [
        AttentionInputs(each.query.detach().float(), each.key.detach().float(), each.scaling, each.bias)
        for each in (student, teacher)
    ]
    value = attention_distance(student, teacher, valid)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, plain_attention_distance(*exact, valid, "kl"), rtol=0.05, atol=0)


def test_attention_kl_of_fp16_inputs_near_convergence_has_the_fp32_gradient():
    student, _, valid = attention_case((3, 3), torch.float16)
    query, key = (each.detach() for each in student[:2])
    noise = 1 + 3e-2 * random_logits(3, *query.shape).to(torch.float16)
    student = student._replace(query=(query * noise).requires_grad_(), scaling=1e-3)
    teacher = student._replace(query=query, key=key)
    (found,) = torch.autograd.grad(attention_distance(student, teacher, valid), student.query)
    exact = [each._replace(query=each.query.detach().double(), key=key.double()) for each in (student, teacher)]
    exact[0].query.requires_grad_()
    (wanted,) = torch.autograd.grad(plain_attention_distance(*exact, valid, "kl"), exact[0].query)
    assert found.dtype == torch.float16
    scale = 2.0**16
    (scaled,) = torch.autograd.grad(scale * attention_distance(student, teacher, valid), student.query)
    assert (scaled.double() / scale - wanted).norm() / wanted.norm() < 0.01


def test_attention_distance_of_a_batch_without_valid_tokens_is_zero_and_connected():
    student, teacher, valid = attention_case((3, 3))
    hidden = torch.full((2, 1, 1, 5), torch.finfo(torch.float32).min)
    value = attention_distance(student._replace(bias=hidden), teacher._replace(bias=hidden), torch.zeros_like(valid))
    value.backward()
    assert value.item() == 0
    assert student.query.grad.abs().max() == 0
