"""Worked examples of lectures on compression, as tests of our functions. Each names what it checks; the arithmetic is beside it.

Everything here can be followed on paper. Numbers that are not whole are rounded to four digits in the comments.
"""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from distill_llm.losses.divergences import forward_kl
from distill_llm.losses.labels import label_loss
from distill_llm.losses.logits import logits_divergence
from distill_llm.losses.objective import parse_objective
from distill_llm.measuring.counting import count_flops, count_params, flop_counter
from distill_llm.pruning.compensation.linear import compensate_linear
from distill_llm.pruning.importance import score
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.moments import Moments
from distill_llm.quantizing.rounding import quantize
from distill_llm.quantizing.scheme import Scheme
from distill_llm.report.tables import retention


def near(found: Any, expected: Any, digits: int = 4) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).double(), torch.tensor(expected).double(), rtol=0, atol=0.6 * 10**-digits
    )


# Sizes and operations.


def flops_of(module: nn.Module, *inputs: torch.Tensor) -> int:
    counter = flop_counter()
    with torch.no_grad(), counter:
        module(*inputs)
    return counter.get_total_flops()


def test_a_linear_layer_has_a_weight_for_each_pair_and_two_operations_for_each_weight():
    layer = nn.Linear(784, 100)
    assert sum(each.numel() for each in layer.parameters()) == 784 * 100 + 100 == 78_500
    assert (
        flops_of(layer, torch.zeros(1, 784)) == 2 * 784 * 100 == 156_800
    )  # a multiply and an add; the bias is left out
    assert flops_of(layer, torch.zeros(32, 784)) == 32 * 156_800


def test_a_small_net_of_three_linears_is_the_sum_of_its_layers():
    net = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    # 784 x 300 + 300 = 235,500; 300 x 100 + 100 = 30,100; 100 x 10 + 10 = 1,010
    assert sum(each.numel() for each in net.parameters()) == 235_500 + 30_100 + 1_010 == 266_610
    assert flops_of(net, torch.zeros(1, 784)) == 2 * (235_200 + 30_000 + 1_000) == 532_400


def test_a_convolution_does_its_filter_at_every_place_of_the_output():
    layer = nn.Conv2d(3, 16, kernel_size=3, padding=1)
    # 16 filters of 3 x 3 x 3 = 27 weights and a bias each; the output has 16 x 32 x 32 numbers.
    assert sum(each.numel() for each in layer.parameters()) == 16 * 27 + 16 == 448
    assert flops_of(layer, torch.zeros(1, 3, 32, 32)) == 2 * 27 * 16 * 32 * 32 == 884_736
    # In two parts, each channel for itself and then all channels at each place, it has 43 weights, not 432.
    apart = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, groups=3, bias=False), nn.Conv2d(3, 16, 1, bias=False))
    assert sum(each.numel() for each in apart.parameters()) == 3 * 9 + 3 * 16 == 75


def bert(layers=2, width=8, heads=2, inner=16, vocabulary=10, positions=6) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads, intermediate_size=inner,
        vocab_size=vocabulary, max_position_embeddings=positions, num_labels=3, attn_implementation="sdpa",
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_an_encoders_parameters_are_those_of_embeddings_attention_ffn_and_norms():
    # Attention: query, key, value and output, 8 x 8 + 8 = 72 each:     288
    # FFN: 8 x 16 + 16 = 144 up, 16 x 8 + 8 = 136 down:                 280
    # Two norms with a scale and a shift for 8 channels:                 32
    layer = 4 * 72 + 144 + 136 + 2 * 16
    assert layer == 600
    # Embeddings of 10 words, 6 positions and 2 segments, and a norm: (10 + 6 + 2) x 8 + 16 = 160.
    # The pooler is 8 x 8 + 8 = 72, the head of three classes 8 x 3 + 3 = 27.
    assert count_params(bert()) == (160 + 2 * layer + 72 + 27, 2 * layer) == (1_459, 1_200)


def test_an_encoders_operations_are_those_of_its_products():
    # B = 2 rows of T = 5 tokens. Projections: 4 x 8 x 8 weights a token, twice; 2 x 10 x 256 = 5,120.
    # Scores and their use: for each row and head 5 x 5 places, 4 channels of a head, twice, and two products:
    #   2 rows x 2 heads x 2 products x 2 x 25 x 4 = 1,600.
    # FFN: 2 x 8 x 16 weights a token; 2 x 10 x 256 = 5,120.
    layer = 5_120 + 1_600 + 5_120
    # Pooler and head read one token of a row: 2 x 2 x 64 = 256 and 2 x 2 x 24 = 96. Embeddings are looked up: 0.
    assert count_flops(bert(), 2, 5) == 2 * layer + 256 + 96 == 24_032


def test_a_decoder_whose_queries_share_keys_saves_weights_and_not_products_of_attention():
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 8,
        "num_attention_heads": 4,
        "intermediate_size": 12,
        "vocab_size": 10,
    }
    shared = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, tie_word_embeddings=True))
    whole = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=4, tie_word_embeddings=True))
    # Queries and output 64 each, keys and values 8 x (2 heads x 2 channels) = 32 each; gate, up and down 96 each; two norms of 8.
    layer = 2 * 64 + 2 * 32 + 3 * 96 + 2 * 8
    assert count_params(shared) == (10 * 8 + layer + 8, layer) == (584, 496)  # the head is the embedding; a last norm
    assert count_params(whole)[1] - layer == 2 * 32
    # Of 3 tokens: 2 x 3 x 480 for matrices, 4 heads x 2 products x 2 x 9 x 2 channels, the head 2 x 3 x 80.
    assert count_flops(shared, 1, 3) == 2 * 3 * 480 + 4 * 2 * 2 * 9 * 2 + 2 * 3 * 80 == 3_648
    assert count_flops(whole, 1, 3) - 3_648 == 2 * 3 * 64


# Softmax, entropies and divergences.

LOGITS = torch.tensor([[5.0, 2.0, 1.0]])
SOFT = {1: [0.936, 0.047, 0.017], 2: [0.736, 0.164, 0.100], 5: [0.500, 0.275, 0.225], 10: [0.415, 0.307, 0.278]}
"""e^(z/T) over their sum. At T = 1: e^5 = 148.4132, e^2 = 7.3891, e = 2.7183, in all 158.5205; 148.4132 / 158.5205 = 0.9362."""


@pytest.mark.parametrize("temperature", [1, 2, 5, 10])
def test_a_temperature_makes_the_distribution_softer_and_keeps_its_order(temperature):
    powers = [math.exp(z / temperature) for z in (5, 2, 1)]
    expected = [each / sum(powers) for each in powers]
    near((LOGITS / temperature).softmax(-1)[0], expected)
    near(expected, SOFT[temperature], 3)  # the three digits that a lecture shows
    # What is taught at that temperature: the divergence of a student of equal logits is log 3 less the entropy, times T squared.
    entropy = -sum(p * math.log(p) for p in expected)
    near(
        logits_divergence(torch.zeros(1, 3), LOGITS, temperature=temperature),
        [temperature**2 * (math.log(3) - entropy)],
    )


def test_kl_of_two_small_distributions_by_hand_is_not_symmetric():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    # 0.7 ln 1.4 + 0.2 ln 0.6667 + 0.1 ln 0.5 = 0.2355 - 0.0811 - 0.0693
    near(forward_kl(q.log(), p.log()), [0.0851])
    # 0.5 ln 0.7143 + 0.3 ln 1.5 + 0.2 ln 2 = -0.1682 + 0.1216 + 0.1386
    near(forward_kl(p.log(), q.log()), [0.0920])
    near(forward_kl(p.log(), p.log()), [0.0])


def test_cross_entropy_is_entropy_and_divergence():
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.5, 0.3, 0.2]])
    # H(p) = 0.7 x 0.3567 + 0.2 x 1.6094 + 0.1 x 2.3026 = 0.8018; H(p, q) = 0.7 x 0.6931 + 0.2 x 1.2040 + 0.1 x 1.6094 = 0.8869
    entropy, cross = 0.8018, 0.8869
    near(forward_kl(q.log(), p.log()), [cross - entropy])
    # Our label loss is a cross-entropy too: weighted by p, over one-hot labels, it is H(p, q).
    near((p[0] * label_loss(q.log().expand(3, 3), torch.arange(3))).sum(), cross)


def test_the_squared_temperature_keeps_the_size_of_gradients():
    """Without T^2 the gradient of the student's logits shrinks as 1 / T^2; with it, it tends to (v_s - v_t) / C (Hinton 2015)."""
    student, teacher = torch.tensor([[1.0, 0.0, -1.0]], requires_grad=True), torch.tensor([[2.0, 1.0, -3.0]])
    for temperature in (1.0, 4.0, 100.0):
        [gradient] = torch.autograd.grad(logits_divergence(student, teacher, temperature=temperature).sum(), student)
        own, theirs = ((each / temperature).softmax(-1) for each in (student.detach(), teacher))
        near(gradient, (temperature * (own - theirs)).tolist())  # T^2 x (q - p) / T
    near(gradient, [[-1 / 3, -1 / 3, 2 / 3]], 1)  # logits have mean 0: (1 - 2) / 3, (0 - 1) / 3, (-1 + 3) / 3


def test_the_combined_loss_is_alpha_times_labels_and_the_rest_times_soft_targets():
    alpha, temperature = 0.3, 2.0
    student, teacher, label = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[4.0, 1.0, 0.0]]), torch.tensor([0])
    # Labels: -ln(e^2 / (e^2 + e + 1)) = ln 11.1073 - 2 = 0.4076.
    near(label_loss(student, label), [0.4076])
    # At T = 2 the student has (e, e^0.5, 1) / 5.3670 = (0.5065, 0.3072, 0.1863), the teacher (e^2, e^0.5, 1) / 10.0378 =
    # (0.7361, 0.1643, 0.0996): KL = 0.7361 ln 1.4534 + 0.1643 ln 0.5347 + 0.0996 ln 0.5347 = 0.2752 - 0.1028 - 0.0624 = 0.1100
    near(logits_divergence(student, teacher, temperature=temperature), [4 * 0.1100], 3)
    whole = alpha * 0.4076 + (1 - alpha) * 4 * 0.1100  # = 0.1223 + 0.3081
    near(whole, 0.4303, 3)
    losses = parse_objective({"labels": {"weight": alpha}, "logits": {"weight": 1 - alpha, "temperature": temperature}})
    weights = {name: term.weight for name, term in losses.terms().items()}
    parts = {
        "labels": label_loss(student, label),
        "logits": logits_divergence(student, teacher, temperature=temperature),
    }
    near(sum(weights[name] * part for name, part in parts.items()), [whole], 3)


def test_the_combined_loss_of_a_batch_is_a_mean_over_its_examples():
    student, teacher = (
        torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
        torch.tensor([[4.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
    )
    both = 0.3 * label_loss(student, torch.tensor([0, 1])) + 0.7 * logits_divergence(student, teacher, temperature=2.0)
    near(both.mean(), (0.4303 + 0.3 * math.log(3)) / 2, 3)


# Pruning.


def with_weights(neurons: list[tuple[list[float], list[float]]]) -> BertForSequenceClassification:
    """A model of a layer whose FFN has these neurons, of incoming and outgoing weights."""
    model = bert(layers=1, width=2, heads=1, inner=len(neurons))
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        layer.intermediate.dense.weight.copy_(torch.tensor([inside for inside, _ in neurons]))
        layer.output.dense.weight.copy_(torch.tensor([outside for _, outside in neurons]).T)
    return model


def test_norms_of_neurons_say_which_go_first_and_differ_in_it():
    model = with_weights([([3, 0], [0, 0]), ([1, 1], [1, 1]), ([2, 0], [1, 0]), ([0, 1], [0, 1])])
    # L1: 3, 4, 3, 2. L2: 3, 2, sqrt 5 = 2.2361, sqrt 2 = 1.4142.
    batch = {"input_ids": torch.tensor([[1, 2]]), "attention_mask": torch.ones(1, 2).long()}
    statistics = collect_statistics(model, [batch], None)
    near(score(statistics, "magnitude_l1").neurons[0], [3.0, 4.0, 3.0, 2.0])
    near(score(statistics, "magnitude").neurons[0], [3.0, 2.0, 2.2361, 1.4142])
    # Half of them: by L2 the second and the fourth go, by L1 the second is the last to go.
    assert score(statistics, "magnitude").neurons[0].argsort()[:2].tolist() == [3, 1]
    assert score(statistics, "magnitude_l1").neurons[0].argmax() == 1


def test_gradient_times_activation_of_a_net_of_two_layers_by_hand():
    """Taylor's score, |a dL/da| of a neuron a: what its removal changes to first order (Molchanov et al. 2019)."""
    x, label = torch.tensor([1.0, 2.0]), 1.0
    first, second = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, -1.0]]), torch.tensor([2.0, -1.0, 3.0])
    # Neurons: (1, 1.5, -2), after ReLU (1, 1.5, 0). Output 2 x 1 - 1.5 = 0.5. L = (0.5 - 1)^2 = 0.25, dL/dy = 2 x (-0.5) = -1.
    # a dL/da = a x w x dL/dy: 1 x 2 x -1 = -2; 1.5 x -1 x -1 = 1.5; 0.
    hidden = (first @ x).relu().requires_grad_()
    loss = (second @ hidden - label).square()
    [gradient] = torch.autograd.grad(loss, hidden)
    near((hidden * gradient).detach(), [-2.0, 1.5, 0.0])
    # What really changes: without the first y = -1.5, L = 6.25, +6; without the second y = 2, L = 1, +0.75; without the third 0.
    changes = [(second @ hidden.detach().index_fill(0, torch.tensor(i), 0.0) - label).square() - loss for i in range(3)]
    near(torch.stack(changes).detach(), [6.0, 0.75, 0.0])
    assert (hidden * gradient).abs().argsort().tolist() == torch.stack(changes).argsort().tolist() == [2, 1, 0]


def test_our_taylor_score_is_gradient_times_activation():
    model = with_weights([([3, 0], [1, 0]), ([1, 1], [1, 1]), ([2, 0], [1, 0])])
    batch = {
        "input_ids": torch.tensor([[1, 2, 3]]),
        "attention_mask": torch.ones(1, 3).long(),
        "labels": torch.tensor([2]),
    }
    seen = []
    down = model.bert.encoder.layer[0].output.dense
    hook = down.register_forward_pre_hook(lambda module, given: (given[0].retain_grad(), seen.append(given[0]))[1])
    loss = F.cross_entropy(model(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"])
    loss.backward()
    hook.remove()
    expected = (seen[0] * seen[0].grad).sum(1).abs()[0]  # of one example, summed over its tokens
    found = score(collect_statistics(model, [batch], "labels"), "taylor").neurons[0]
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-7)


def test_what_is_removed_is_taken_over_by_least_squares():
    """y = 1 x_1 + 2 x_2, where x_2 is always 3 x_1: without x_2 the weight of x_1 becomes 1 + 2 x 3 = 7."""
    x = torch.tensor([[1.0, 3.0], [2.0, 6.0], [-1.0, -3.0]])
    near(x.T @ x, [[6.0, 18.0], [18.0, 54.0]])  # 18 / 6 = 3
    moments = Moments(x.mean(0), x.T @ x / 3)
    found, _ = compensate_linear(torch.tensor([[1.0, 2.0]]), None, moments, torch.tensor([0]), ridge=0.0)
    near(found, [[7.0]])


# Fewer bits.


def rounded_row(values: list[float], scheme: Scheme) -> tuple[list[int], float, int, list[float]]:
    """A row of weights rounded by torchao with our settings: whole numbers, scale, zero point, and what they stand for."""
    model = bert(layers=1, width=len(values), heads=1, inner=len(values))
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight.copy_(torch.tensor(values).expand(len(values), -1))
    found = quantize(model, scheme).bert.encoder.layer[0].intermediate.dense.weight
    zero = 0 if found.zero_point is None else int(found.zero_point.flatten()[0])
    return found.qdata[0].tolist(), float(found.scale.flatten()[0]), zero, found.dequantize()[0].tolist()


@pytest.mark.slow
def test_four_bits_for_minus_one_to_one_symmetric():
    """Whole numbers from -8 to 7, and 0 for 0. The lectures divide by 7, which leaves -8 unused; torchao divides by 7.5."""
    values = [-1.0, -0.4, 0.0, 0.3, 0.7, 1.0]
    q, scale, zero, back = rounded_row(values, Scheme(4))
    near(scale, 1 / 7.5)  # 0.1333
    # -0.4 x 7.5 = -3; 0.3 x 7.5 = 2.25; 0.7 x 7.5 = 5.25; 1 x 7.5 = 7.5, of which 7 is the largest there is
    assert zero == 0 and q[1:] == [-3, 0, 2, 5, 7]
    assert q[0] in (-8, -7)  # -7.5 is just between: both are half a step off
    near(back[1:], [-0.4, 0.0, 0.2667, 0.6667, 0.9333])
    near(max(abs(a - b) for a, b in zip(values, back, strict=True)), scale / 2)  # 0.0667 at both ends


@pytest.mark.slow
def test_four_bits_for_minus_a_half_to_one_and_a_half_asymmetric():
    """Fifteen steps for a range of 2: 0.1333 each. The zero point is where 0 comes to lie: -8 + 0.5 / 0.1333 = -8 + 3.75 = -4."""
    values = [-0.5, 0.0, 0.25, 0.8, 1.1, 1.5]
    q, scale, zero, back = rounded_row(values, Scheme(4, symmetric=False))
    near(scale, 2 / 15)
    assert zero == -4
    # w / s + z: -3.75 - 4, 0 - 4, 1.875 - 4, 6 - 4, 8.25 - 4, 11.25 - 4
    assert q == [-8, -4, -2, 2, 4, 7]
    near(back, [-0.5333, 0.0, 0.2667, 0.8, 1.0667, 1.4667])
    assert max(abs(a - b) for a, b in zip(values, back, strict=True)) <= scale / 2 + 1e-6
    # Symmetric, the largest value rules: 1.5 / 7.5 = 0.2 a step, and the whole numbers below -3 stay unused.
    q, scale, zero, back = rounded_row(values, Scheme(4))
    near(scale, 0.2)
    assert zero == 0 and min(q) >= -3


@pytest.mark.slow
def test_eight_bits_have_steps_sixteen_times_as_fine_and_a_group_has_a_scale_of_its_own():
    _, scale, _, _ = rounded_row([-1.0, -0.4, 0.0, 0.3, 0.7, 1.0], Scheme(8))
    near(scale, 1 / 127.5, 6)
    # One large weight makes the steps of its row coarse: 12 / 7.5 = 1.6, and all others become 0 ...
    outlier = [0.3, -0.2, 0.1, 12.0, 0.5, -0.5]
    assert rounded_row(outlier, Scheme(4))[0] == [0, 0, 0, 7, 0, 0]
    # ... but not in groups of three: 0.3 / 7.5 = 0.04 for the first.
    q, scale, _, _ = rounded_row(outlier, Scheme(4, group_size=3))
    near(scale, 0.04)
    assert q[1:3] == [-5, 2] and q[3:] == [7, 0, 0]


# Shares and speed.


def test_compression_ratio_and_retention():
    # 266,610 parameters in 4 bytes are 1.066 MB; a tenth of them, in 1 byte, are 0.027 MB: 40 times less.
    assert pytest.approx(40) == 266_610 * 4 / (266_610 / 10)
    assert retention(0.893, 0.94) == pytest.approx(0.95)
    assert retention(20.0, 16.0, higher_is_better=False) == pytest.approx(0.8)  # perplexity: lower is better


def test_amdahls_law_bounds_what_faster_layers_bring():
    """Where layers take 80% of the time, halving it gives 1 / (0.2 + 0.8 / 2) = 1.67, and never more than 5."""
    model = bert(layers=4, width=32, inner=128, heads=4, vocabulary=50, positions=64)
    whole = count_flops(model, 1, 32)
    halved = count_flops(bert(layers=2, width=32, inner=128, heads=4, vocabulary=50, positions=64), 1, 32)
    rest = 2 * (32 * 32 + 32 * 3)  # pooler and head, for one token
    share = (whole - rest) / whole
    assert whole / halved == pytest.approx(1 / ((1 - share) + share / 2))  # counted operations follow the law
    assert pytest.approx(1.6667, abs=1e-4) == 1 / (0.2 + 0.8 / 2)
