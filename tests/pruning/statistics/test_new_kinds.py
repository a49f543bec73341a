"""Kinds of units that the package does not have: they are tapped, scored and saved by their rows alone."""

from dataclasses import replace

import pytest
import torch
from builders.families import family_batch, family_model
from builders.pruning import collect

from distill_llm import score
from distill_llm.architectures import modeling_pruned
from distill_llm.architectures.lineage import LAYER_UNITS, LayerUnit
from distill_llm.pruning.importance import Importance
from distill_llm.pruning.statistics.record import Statistics
from distill_llm.pruning.units import sizes
from distill_llm.pruning.units.ffn import Ffn
from distill_llm.pruning.units.kinds import KINDS

TILE = 8


class Gates(Ffn):
    """All tiles of a layer, as one unit."""

    name = scored = "gates"
    cuts = "tiles"


@pytest.fixture
def tiles(monkeypatch):
    """Neurons are in tiles of eight neighbours: a kind of its own inside layers, and one of all that a layer has."""
    counted = modeling_pruned.layer_counts

    def with_tiles(*args):
        counts = counted(*args)
        return {**counts, "tiles": counts["neurons"] // TILE}

    for module in (modeling_pruned, sizes):
        monkeypatch.setattr(module, "layer_counts", with_tiles)
    monkeypatch.setitem(LAYER_UNITS, "tiles", LayerUnit("t"))
    monkeypatch.setitem(LAYER_UNITS, "neurons", replace(LAYER_UNITS["neurons"], within="tiles"))
    monkeypatch.setitem(KINDS, "gates", Gates())


def labelled(model):
    """A batch of one example, with labels where the head needs them."""
    batch = family_batch(model, batch=1)
    return batch | {"labels": batch["input_ids"] if model.config.model_type == "llama" else torch.tensor([1])}


def effects_of(model, batch, path):
    """(layers, neurons): the sums over tokens of a g and of a^2 at the FFN-down linears; and the weights of these."""
    inputs = []
    downs = [module for name, module in model.named_modules() if name.endswith(path) and "attention" not in name]
    handles = [down.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for down in downs]
    loss = model(**batch).loss
    if model.config.model_type == "llama":
        loss = loss * (batch["input_ids"].shape[1] - 1)  # statistics are of the sum over an example's tokens
    gradients = torch.autograd.grad(loss, inputs)
    for handle in handles:
        handle.remove()
    rows = [((a * g).sum((0, 1)), a.square().sum((0, 1))) for a, g in zip(inputs, gradients, strict=True)]
    weights = [down.weight.detach() for down in downs]
    return [torch.stack([each.detach() for each in column]) for column in zip(*rows, strict=True)], weights


@pytest.mark.parametrize(("family", "path"), [("bert", "output.dense"), ("llama", "down_proj")])
def test_a_kind_inside_layers_is_tapped_scored_and_saved(tiles, family, path, tmp_path):
    model = family_model(family)
    batch = labelled(model)
    statistics = collect(model, [batch], exact=True)
    (effects, squares), weights = effects_of(model, batch, path)
    for i in range(5):
        effect = effects[i].view(-1, TILE).sum(1)
        torch.testing.assert_close(statistics.tiles[i].taylor, effect.abs(), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(statistics.tiles[i].fisher, effect.square(), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(statistics.tiles[i].activation, squares[i].view(-1, TILE).sum(1))
        read = weights[i].abs().sum(0) * squares[i].sqrt()
        torch.testing.assert_close(statistics.tiles[i].wanda, read.view(-1, TILE).sum(1))
        made = statistics.neurons[i].magnitude.view(-1, TILE).sum(1)
        torch.testing.assert_close(statistics.tiles[i].magnitude, made)
    torch.testing.assert_close(statistics.gates.fisher, statistics.ffn.fisher)
    torch.testing.assert_close(statistics.gates.magnitude, statistics.ffn.magnitude)
    torch.testing.assert_close(statistics.layers.magnitude, statistics.attention.magnitude + statistics.ffn.magnitude)

    scores = score(statistics)
    assert [len(row) for row in scores.tiles] == [64 // TILE] * 5
    assert torch.equal(scores.gates, statistics.gates.fisher)
    statistics.save(tmp_path / "statistics.safetensors")
    scores.save(tmp_path / "scores.safetensors")
    again = Statistics.load(tmp_path / "statistics.safetensors")
    assert torch.equal(again.tiles[3].wanda, statistics.tiles[3].wanda)
    assert torch.equal(again.gates.activation, statistics.gates.activation)
    loaded = Importance.load(tmp_path / "scores.safetensors")
    assert torch.equal(loaded.tiles[4], scores.tiles[4]) and torch.equal(loaded.gates, scores.gates)
    loaded.require(["tiles", "gates"])


def test_kinds_without_scores_of_their_own_have_no_attribute():
    scores = Importance("fisher", layers=torch.rand(2))
    assert scores.heads == () and scores.hidden is None
    with pytest.raises(AttributeError):
        _ = scores.tiles
    with pytest.raises(TypeError, match="tiles"):
        Importance("fisher", tiles=[torch.rand(2)])
