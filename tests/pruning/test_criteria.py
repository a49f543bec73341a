"""Scores against brute force: each unit is removed, and the change of every example's loss is measured."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.pruning import inputs_of, layers_in, linears_in, names_of, without
from scipy.stats import spearmanr
from torch import nn
from torch.nn import functional as F

from distill_llm.common.errors import InputError
from distill_llm.pruning.criteria import CRITERIA
from distill_llm.pruning.cutting.masking import masked
from distill_llm.pruning.importance import Importance, score
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.statistics.leave_one_out import leave_one_out
from distill_llm.pruning.statistics.refit import refit_costs
from distill_llm.pruning.statistics.settings import CalibrationSettings
from distill_llm.pruning.units.sizes import counts_of


def everything(model, batches):
    """Statistics that every criterion can read."""
    found = collect_statistics(model, batches, settings=CalibrationSettings(weight_gradients=True, moment_share=1))
    return refit_costs(model, leave_one_out(model, batches, found))


def losses_of(model, batch) -> torch.Tensor:
    """(B,): cross-entropy of every example."""
    with torch.no_grad():
        logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def changes(model, batch, kind, losses=losses_of) -> torch.Tensor:
    """(units, B): how much every example's loss changes without each unit, over all layers."""
    before, found = losses(model, batch), []
    for layer, shape in enumerate(counts_of(model)):
        for unit in range(1 if kind == "layers" else shape[kind]):
            with masked(model, without(model, layer, kind, unit)):
                found.append(losses(model, batch) - before)
    return torch.stack(found)


@pytest.fixture(scope="module", params=["bert", "distilbert"])
def nearly_linear(request):
    """A model trained for a few steps whose units add little each, so that first order holds; with its batch."""
    model = tiny_model(request.param, layers=2, intermediate=48, num_labels=3)
    batch = random_batch(model, batch=24)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(8):
        F.cross_entropy(model(**{**batch, "labels": None}).logits, batch["labels"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        for pair in linears_in(model):
            for module in pair:
                module.weight *= 0.1
    return model, batch, collect_statistics(model, [batch], settings=CalibrationSettings(exact=True))


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_taylor_and_fisher_rank_units_as_the_measured_change_of_loss_does(nearly_linear, kind):
    model, batch, statistics = nearly_linear
    change = changes(model, batch, kind)
    for criterion, measured in (("taylor", change.abs().mean(1)), ("fisher", change.square().mean(1))):
        values = torch.cat(getattr(score(statistics, criterion), kind))
        assert len(values) == len(measured)
        assert spearmanr(values, measured).statistic > 0.97, criterion
        assert values.sum() == pytest.approx(float(measured.sum()), rel=0.15), criterion


def made_linear(family):
    """A model whose last hidden state is linear in its last layer's heads, and, without the FFN, neurons."""
    model = tiny_model(family, "base")
    last = layers_in(model)[-1]
    for name, module in list(last.named_modules()):
        if isinstance(module, nn.LayerNorm):
            parent, _, own = name.rpartition(".")
            setattr(last.get_submodule(parent), own, nn.Identity())
    return model


def linear_loss(outputs, batch):
    """(B,): a weighted sum of the hidden states of valid tokens."""
    hidden = outputs.last_hidden_state
    weights = torch.randn(hidden.shape[1:], generator=torch.Generator().manual_seed(3))
    return ((hidden * weights).sum(-1) * batch["attention_mask"]).sum(1)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@pytest.mark.parametrize("kind", ["heads", "neurons", "layers"])
def test_taylor_and_fisher_are_the_change_of_loss_where_the_loss_is_linear_in_the_unit(family, kind):
    model = made_linear(family)
    if kind == "heads":
        nn.init.zeros_(linears_in(model)[-1][1].weight)
    batch = random_batch(model, labels=False)

    def losses(model, batch):
        with torch.no_grad():
            return linear_loss(model(**batch), batch)

    change = changes(model, batch, kind, losses)
    statistics = collect_statistics(
        model, [batch], lambda out, given: linear_loss(out, given).sum(), settings=CalibrationSettings(exact=True)
    )
    units = 1 if kind == "layers" else counts_of(model)[-1][kind]
    for criterion, measured in (("taylor", change.abs().mean(1)), ("fisher", change.square().mean(1))):
        values = getattr(score(statistics, criterion), kind)[-1].reshape(-1)
        np.testing.assert_allclose(values, measured[-units:], rtol=1e-3, atol=1e-3 * float(measured[-units:].max()))


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_magnitude_is_the_norm_of_the_weights_that_make_and_use_the_unit(family):
    model = tiny_model(family)
    found = score(collect_statistics(model, [], loss=None, settings=CalibrationSettings(moments=False)), "magnitude")
    query, key, value, out, up, down = (layers_in(model)[1].get_submodule(n).weight.detach() for n in names_of(model))
    heads, neurons = [], []
    for head in range(4):
        rows = range(head * 8, head * 8 + 8)
        heads.append(
            sum(w[r].norm() ** 2 for w in (query, key, value) for r in rows) + sum(out[:, r].norm() ** 2 for r in rows)
        )
    for neuron in range(64):
        neurons.append(up[neuron].norm() ** 2 + down[:, neuron].norm() ** 2)
    np.testing.assert_allclose(found.heads[1], torch.stack(heads).sqrt(), rtol=1e-5)
    np.testing.assert_allclose(found.neurons[1], torch.stack(neurons).sqrt(), rtol=1e-5)
    np.testing.assert_allclose(found.layers[1], (sum(heads) + sum(neurons)).sqrt(), rtol=1e-5)


def test_activation_is_the_root_mean_square_over_valid_tokens():
    model = tiny_model()
    batch = random_batch(model)
    found = score(collect_statistics(model, [batch], loss=None), "activation")
    attention, ffn = linears_in(model)[2]
    with inputs_of([attention, ffn]) as seen, torch.no_grad():
        model(**batch)
    valid = batch["attention_mask"].bool()
    context, neurons = seen[0][valid].unflatten(-1, (4, 8)), seen[1][valid]
    np.testing.assert_allclose(found.heads[2], context.square().sum(-1).mean(0).sqrt(), rtol=0.01)
    np.testing.assert_allclose(found.neurons[2], neurons.square().mean(0).sqrt(), rtol=0.01)


def test_block_influence_is_one_minus_the_mean_cosine_of_a_layers_input_and_output():
    model = tiny_model()
    batch = random_batch(model)
    found = score(collect_statistics(model, [batch], loss=None), "block_influence")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
    valid = batch["attention_mask"].bool()
    for i in range(3):
        x, y = hidden[i][valid].numpy(), hidden[i + 1][valid].numpy()
        cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
        assert float(found.layers[i]) == pytest.approx(1 - cosines.mean(), rel=1e-4)
    assert found.heads == found.neurons == ()


def test_block_influence_of_a_layer_that_hands_its_input_on_is_zero():
    model = tiny_model(layers=2)
    layer = layers_in(model)[1]
    for name in ("attention.output", "output"):
        nn.init.zeros_(layer.get_submodule(name).dense.weight)
        nn.init.zeros_(layer.get_submodule(name).dense.bias)
        layer.get_submodule(name).LayerNorm = nn.Identity()
    found = score(collect_statistics(model, [random_batch(model)], loss=None), "block_influence")
    assert float(found.layers[1]) == pytest.approx(0, abs=1e-5)
    assert float(found.layers[0]) > 0.01


def test_scores_do_not_depend_on_how_much_data_repeats_itself():
    model = tiny_model()
    batch = random_batch(model)
    once, thrice = (everything(model, [batch] * times) for times in (1, 3))
    for criterion in CRITERIA:
        for mine, its in zip(score(once, criterion).neurons, score(thrice, criterion).neurons, strict=True):
            np.testing.assert_allclose(
                mine, its, rtol=1e-3, atol=1e-5 if criterion == "flap" else 1e-7, err_msg=criterion
            )
        if score(once, criterion).layers is not None:
            np.testing.assert_allclose(score(once, criterion).layers, score(thrice, criterion).layers, rtol=1e-3)


def test_random_scores_follow_the_seed():
    statistics = collect_statistics(tiny_model(), [], loss=None)
    one, again, other = (score(statistics, "random", seed).layers for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_unknown_criteria_and_missing_gradients_are_refused():
    model = tiny_model()
    statistics = collect_statistics(model, [random_batch(model)], loss=None)
    with pytest.raises(InputError, match="criterion: got 'fischer'; accepted: 'fisher'"):
        score(statistics, "fischer")
    for criterion in ("taylor", "fisher"):
        with pytest.raises(InputError, match="collected with a loss"):
            score(statistics, criterion)
    score(replace(statistics, has_gradients=True), "fisher")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_survive_a_file(tmp_path, criterion):
    model = tiny_model(layers=12)
    batches = [random_batch(model)]
    scores = score(everything(model, batches), criterion)
    scores.save(tmp_path / "scores.safetensors")
    loaded = Importance.load(tmp_path / "scores.safetensors")
    assert loaded.criterion == criterion
    rows = ("heads", "neurons", "queries")
    for mine, its in zip(*([row for kind in rows for row in getattr(x, kind)] for x in (loaded, scores)), strict=True):
        assert torch.equal(mine, its)
    for kind in ("layers", "attention", "ffn", "hidden"):
        mine, its = getattr(loaded, kind), getattr(scores, kind)
        assert mine is its is None or torch.equal(mine, its)
