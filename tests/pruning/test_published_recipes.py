"""FLAP and GISP: their scores by hand, what goes first by them, and which units they score."""

import numpy as np
import pytest
import torch
from builders.families import family_batch, family_model, groups_of
from builders.models import tiny_model
from builders.pruning import collect, inputs_of
from builders.recipes import recipe_for
from builders.rounds import Counted, cutter

from distill_llm.architectures.families import family_of, layers_of
from distill_llm.common.errors import InputError
from distill_llm.pipeline import calibration as calibrating
from distill_llm.pruning.importance import Importance, score
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.recipe.recipe import parse_recipe

HIDDEN, QUERIES = 32, 8


def matrix(module) -> torch.Tensor:
    """(outputs, inputs)."""
    return module.weight.detach().T if "Conv1D" in type(module).__name__ else module.weight.detach()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_flap_is_the_variance_of_channels_times_the_norm_of_their_weights_standardised_in_the_layer(family):
    model = family_model(family)
    batches = [family_batch(model, seed=seed) for seed in (0, 1)]
    found = score(collect(model, batches, loss=None), "flap")
    paths = (family_of(model).attention_out, family_of(model).ffn_out)
    for i, layer in enumerate(layers_of(model)):
        readers = [layer.get_submodule(path) for path in paths]
        rows = [[], []]
        for batch in batches:
            with inputs_of(readers) as seen, torch.no_grad():
                model(**batch)
            for k in (0, 1):
                rows[k].append(seen[k].reshape(*batch["attention_mask"].shape, -1)[batch["attention_mask"].bool()])
        for kind, reader, values in zip(("heads", "neurons"), readers, rows, strict=True):
            varies = np.var(torch.cat(values).double().numpy(), axis=0, ddof=1)
            metric = varies * matrix(reader).double().square().sum(0).numpy()
            standard = (metric - metric.mean()) / metric.std(ddof=1)
            expected = standard if kind == "neurons" else standard.reshape(groups_of(model), -1).mean(1)
            np.testing.assert_allclose(getattr(found, kind)[i], expected, rtol=2e-3, atol=2e-4)
    assert found.layers is found.hidden is None and found.queries == ()


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gisp_is_the_sum_over_a_units_weights_of_weight_times_mean_gradient(family, checkpointing):
    model = family_model(family)
    batches = [family_batch(model, seed=seed) for seed in (0, 1)]

    def loss(outputs, batch):
        logits = outputs.logits if outputs.logits.dim() == 2 else outputs.logits[batch["attention_mask"].bool()]
        return logits.log_softmax(-1)[:, 1].square().sum()

    settings = {"exact": True, "checkpointing": checkpointing, "weight_gradients": True}
    found = score(collect(model, batches, loss, **settings), "gisp")
    model.requires_grad_(True)
    for batch in batches:
        loss(model(**batch), batch).backward()
    groups, examples = groups_of(model), sum(len(batch["input_ids"]) for batch in batches)
    family = family_of(model)
    for i, layer in enumerate(layers_of(model)):
        parts = {name: each for name, each in layer.named_parameters() if each.dim() > 1 and "orm" not in name}
        product = {name: (each * each.grad / examples).detach().abs() for name, each in parts.items()}
        if model.config.model_type == "gpt2":  # transposed; queries, keys and values side by side
            product = {name: each.T for name, each in product.items()}
        heads, neurons = torch.zeros(groups), torch.zeros(64)
        for name, each in product.items():
            if name == f"{family.attention_out}.weight":
                heads += each.sum(0).view(groups, -1).sum(1)
            elif name == f"{family.ffn_out}.weight":
                neurons += each.sum(0)
            elif len(each) == 3 * HIDDEN:
                heads += each.sum(1).view(3, groups, -1).sum((0, 2))
            elif "attn" in name or "attention.self" in name:
                heads += each.sum(1).view(groups, -1).sum(1)
            else:
                neurons += each.sum(1)
        torch.testing.assert_close(found.heads[i], heads, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(found.neurons[i], neurons, rtol=1e-3, atol=1e-7)
        assert float(found.layers[i]) == pytest.approx(float(sum(each.sum() for each in product.values())), rel=1e-3)


def test_by_flap_the_lowest_score_goes_first_whatever_its_units_cost():
    model = tiny_model(layers=2)  # a head costs 16 neurons
    low, high = torch.full((64,), -0.9), torch.full((64,), 0.5)
    heads = (torch.tensor([3.0, 3.0, -1.0, 3.0]), torch.full((4,), 3.0))
    one_head = 1 - 1100 / sum(p.numel() for p in layers_of(model).parameters())
    for criterion, heads_left in (("flap", 3), ("fisher", 4)):
        plan = plan_pruning(model, Importance(criterion, heads, (low, high), torch.ones(2)), one_head)
        assert [len(row.heads) for row in plan.layers] == [heads_left, 4], criterion
        assert len(plan.layers[1].neurons) == 64, "the dearer neurons stay"
    rounded = plan_pruning(model, Importance("flap", heads, (low, high), torch.ones(2)), 0.7, round_to=8)
    assert all(len(row.neurons) % 8 == 0 for row in rounded.layers) and len(rounded.layers[1].neurons) > 32
    spent = plan_pruning(model, Importance("flap", heads, (low, low), torch.ones(2)), 0.8, round_to=60)
    assert sum(len(row.neurons) for row in spent.layers) == 60, "blocks of scores below zero come back, too"


def test_a_criterion_of_some_units_is_refused_for_others_before_and_after_statistics(tmp_path):
    model = tiny_model()
    batch = family_batch(model)
    scores = score(collect(model, [batch], loss=None), "flap")
    accepted = "scores of layers: a criterion other than flap, which does not score them"
    with pytest.raises(InputError, match=accepted):
        plan_pruning(model, scores, 0.5, units=("layers",))
    for units, words in (
        (["heads", "hidden"], "remove hidden: flap scores heads and neurons$"),
        (["heads", "layers"], "remove layers: flap scores heads and neurons, or set layer_criterion, too$"),
    ):
        with pytest.raises(InputError, match=f"pruning.units: got .*; {words}"):
            parse_recipe(recipe_for(tmp_path, pruning={"keep": 0.5, "criterion": "flap", "units": units}))
    both = {"keep": 0.5, "criterion": "flap", "units": ["heads", "layers"], "layer_criterion": "block_influence"}
    parse_recipe(recipe_for(tmp_path, pruning=both | {"scope": "local"}))
    scores.save(tmp_path / "scores.safetensors")
    again = Importance.load(tmp_path / "scores.safetensors")
    again.check([{"heads": 4, "neurons": 64, "queries": 4}] * 3, 32)
    with pytest.raises(InputError, match="scores: got '3 layers"):
        again.check([{"heads": 4, "neurons": 64, "queries": 4}] * 2, 32)


def test_gisp_asks_for_gradients_of_weights_and_a_recipe_collects_them(tmp_path, monkeypatch):
    model = tiny_model(layers=3)
    batch = family_batch(model)
    plain = collect(model, [batch], "kl")
    assert not plain.heads[0].weight_taylor.any() and not plain.has_weight_gradients
    with pytest.raises(InputError, match="criterion: got 'gisp'; collect the statistics with a loss and Calibration"):
        score(plain, "gisp")
    file = tmp_path / "statistics.safetensors"
    cutter(tmp_path, Counted(model)).cut(model, model, 0.5, file)
    asked = []
    found = calibrating.collect_statistics
    counted = lambda *args, settings: asked.append(settings) or found(*args, settings=settings)  # noqa: E731
    monkeypatch.setattr(calibrating, "collect_statistics", counted)
    gisp = {"criterion": "gisp", "compensate": False}
    cut = cutter(tmp_path, Counted(model), **gisp).cut(model, model, 0.5, file)
    assert len(asked) == 1 and asked[0].weight_gradients, "the file has none"
    again = cutter(tmp_path, Counted(model), **gisp).cut(model, model, 0.5, file)
    assert len(asked) == 1 and again.plan == cut.plan, "now it has"
    cutter(tmp_path, Counted(model), **gisp, cuts=3).cut(model, model, 0.5)
    assert len(asked) == 4
