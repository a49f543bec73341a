"""What norms expect of a batch, against hand computations."""

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from distill_llm.synthesis.norms import NormStatistics


def distance(module, inputs):
    with NormStatistics(module).watching() as found:
        module(inputs)
    assert len(found) == 1
    return found[0].item()


def random_(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module


def test_a_layer_norm_expects_its_bias_and_its_weight_over_tokens():
    norm, inputs = random_(nn.LayerNorm(6)), torch.randn(2, 5, 6)
    seen = norm(inputs).flatten(0, 1)
    apart = (seen.mean(0) - norm.bias) ** 2 + (seen.std(0, unbiased=False) - norm.weight.abs()) ** 2
    assert distance(norm, inputs) == pytest.approx((apart.mean() / norm.weight.square().mean()).item(), rel=1e-5)


def test_a_batch_norm_expects_what_the_checkpoint_keeps_of_its_inputs():
    norm = random_(nn.BatchNorm2d(3)).eval()
    norm.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
    inputs = torch.randn(4, 3, 2, 2)
    seen = inputs.transpose(0, 1).flatten(1)
    std = norm.running_var.sqrt()
    apart = (seen.mean(1) - norm.running_mean) ** 2 + (seen.std(1, unbiased=False) - std) ** 2
    assert distance(norm, inputs) == pytest.approx((apart.mean() / std.square().mean()).item(), rel=1e-5)
    matching = (seen - seen.mean(1, keepdim=True)) / seen.std(1, unbiased=False, keepdim=True)
    matching = matching * std[:, None] + norm.running_mean[:, None]
    assert distance(norm, matching.reshape(3, 4, 2, 2).transpose(0, 1)) == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("kind, extra", [(LlamaRMSNorm, 0), (GemmaRMSNorm, 1)])
def test_an_rms_norm_expects_a_second_moment_about_zero_by_the_factors_that_it_applies(kind, extra):
    norm, inputs = random_(kind(6)), torch.randn(2, 5, 6) + 3
    factors = norm.weight + extra
    seen = norm(inputs).flatten(0, 1)
    apart = (seen.square().mean(0).sqrt() - factors.abs()) ** 2
    assert distance(norm, inputs) == pytest.approx((apart.mean() / factors.square().mean()).item(), rel=1e-4)


def test_norms_without_weights_or_running_statistics_expect_nothing_and_no_hook_stays():
    model = nn.Sequential(nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm1d(4, track_running_stats=False))
    norms = NormStatistics(model)
    assert not norms.expected
    kept = nn.LayerNorm(4)
    with NormStatistics(kept).watching() as found:
        kept(torch.randn(2, 4))
    kept(torch.randn(2, 4))
    assert len(found) == 1
