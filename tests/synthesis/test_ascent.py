"""Inputs that are optimised: by the gradient that autograd gives a hand-written loss, and each alone."""

import pytest
import torch
from builders.models import tiny_model
from builders.recipes import WORDS
from transformers import BertTokenizer

from distill_llm.synthesis.ascent import Ascent, climb
from distill_llm.synthesis.norms import NormStatistics
from distill_llm.synthesis.spaces import EmbeddingSpace

CLASSES = torch.tensor([0, 1, 1, 0])


@pytest.fixture
def model():
    return tiny_model(vocab=len(WORDS), layers=2)


@pytest.fixture
def space(model):
    return EmbeddingSpace.of(model, BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}), 6)


def draws():
    return torch.Generator().manual_seed(1)


def layer_norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]


@pytest.mark.parametrize("statistics", [None, 0.7])
def test_two_steps_are_those_of_adam_on_a_loss_written_by_hand(model, space, statistics):
    settings = Ascent(steps=2, learning_rate=0.1, prior=0.3, statistics=statistics)
    found = climb(model, space, CLASSES, settings, draws())

    values = space.noise(4, draws()).requires_grad_(True)
    first = second = torch.zeros_like(values)
    for step in (1, 2):
        embeddings = torch.where(space.free, space.mean + space.std * values, space.fixed)
        kept = []
        handles = [
            each.register_forward_hook(lambda m, a, out, kept=kept: kept.append((m, out)))
            for each in layer_norms(model)
        ]
        logits = model(inputs_embeds=embeddings).logits
        for handle in handles:
            handle.remove()
        of_class = logits[torch.arange(4), CLASSES]
        loss = -of_class.sum() if statistics is None else (logits.logsumexp(-1) - of_class).sum()
        loss = loss + 0.3 * values.square().mean((1, 2)).sum()
        if statistics is not None:
            parts = []
            for norm, out in kept:
                seen = out.flatten(0, 1)
                apart = (seen.mean(0) - norm.bias) ** 2 + (seen.std(0, unbiased=False) - norm.weight.abs()) ** 2
                parts.append(apart.mean() / norm.weight.square().mean())
            loss = loss + 0.7 * 4 * torch.stack(parts).mean()
        (gradient,) = torch.autograd.grad(loss, values)
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
        change = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        values = (values - 0.1 * change).detach().requires_grad_(True)
    expected = torch.where(space.free, space.mean + space.std * values, space.fixed)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_classes_become_likely_and_statistics_nearer_and_the_model_stays_as_it_is(model, space):
    model.train()
    model.classifier.bias.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = space.whole(space.noise(4, draws()))
    found = climb(model, space, CLASSES, Ascent(60, 0.1, 0.0), draws())
    inverted = climb(model, space, CLASSES, Ascent(60, 0.1, 0.0, statistics=10.0), draws())
    assert model.training and not model.classifier.bias.requires_grad and model.classifier.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def logits(inputs):
        return model.eval()(inputs_embeds=inputs).logits.detach()[torch.arange(4), CLASSES]

    def apart(inputs):
        with NormStatistics(model).watching() as distances:
            model(inputs_embeds=inputs)
        return torch.stack(distances).mean().item()

    assert (logits(found) > logits(start) + 0.5).all()
    assert apart(inverted) < 0.7 * apart(start) and apart(inverted) < apart(found)
    assert (model(inputs_embeds=inverted).logits.argmax(-1) == CLASSES).all()


def test_without_statistics_an_input_is_found_alone(model, space):
    settings = Ascent(3, 0.1)
    noise = space.noise(4, draws())

    together = climb(model, space, CLASSES, settings, draws())
    for row in range(4):
        own = _with_noise(space, noise[row : row + 1])
        torch.testing.assert_close(climb(model, own, CLASSES[row : row + 1], settings, draws())[0], together[row])


def _with_noise(space, values):
    class Given(EmbeddingSpace):
        def noise(self, rows, draws):
            return values.clone()

    return Given(**vars(space))
