"""The strength of compensation, chosen on held-out rows: divergences and the rule by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from builders.families import family_batch, family_model
from builders.models import random_batch, tiny_model
from builders.pruning import collect, linears_in, plan_of, random_scores
from builders.rounds import Counted, cutter, same

from distill_llm.common.errors import InputError
from distill_llm.pipeline.stages.prune import Prune
from distill_llm.pruning.compensation.bypass import fit_bypasses
from distill_llm.pruning.compensation.in_order import InOrder
from distill_llm.pruning.cutting.in_order import prune_in_order
from distill_llm.pruning.cutting.strength import IN_ORDER, RIDGES, Strength, choose_strength, described, row_divergences
from distill_llm.pruning.cutting.surgery import prune
from distill_llm.pruning.plan import LayerPlan, PruningPlan, keep_layers
from distill_llm.pruning.planning.planner import plan_pruning
from distill_llm.pruning.statistics.collecting import collect_statistics
from distill_llm.pruning.units.sizes import counts_of


def shares(logits) -> np.ndarray:
    """Softmax in float64."""
    logits = logits.detach().double().numpy()
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(target, logits) -> np.ndarray:
    """Over the last dimension."""
    p, q = shares(target), shares(logits)
    return (p * (np.log(p) - np.log(q))).sum(-1)


def by_row(model, student, batches) -> np.ndarray:
    """Divergences of a classifier's rows, by hand."""
    pairs = [
        [each(**{k: v for k, v in b.items() if k != "labels"}).logits for each in (model, student)] for b in batches
    ]
    return np.concatenate([kl(*pair) for pair in pairs])


@pytest.fixture(scope="module")
def classifier():
    """A model whose logits are far apart, a plan that halves it, and batches."""
    model = tiny_model(layers=4)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    batches = [random_batch(model, batch=8, seed=seed) for seed in range(14)]
    return model, plan_pruning(model, random_scores(counts_of(model)), 0.5), batches


def test_the_divergence_of_a_row_is_that_of_the_softmax(classifier):
    model, plan, batches = classifier
    student = prune(model, plan)
    np.testing.assert_allclose(row_divergences(model, student, batches), by_row(model, student, batches), 1e-4, 1e-6)
    assert float(row_divergences(model, model, batches).abs().max()) < 1e-6


def test_a_row_of_text_counts_once_whatever_its_length():
    model = family_model("llama")
    student, batch = prune(model, keep_layers(model, [0, 2, 4])), family_batch(model)
    mask = batch["attention_mask"].bool()
    assert len(set(mask.sum(1).tolist())) > 1
    tokens = kl(*(each(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits for each in (model, student)))
    expected = [tokens[i, :-1][(mask[i, 1:] & mask[i, :-1]).numpy()].mean() for i in range(len(mask))]
    np.testing.assert_allclose(row_divergences(model, student, [batch]), expected, rtol=1e-3)


def test_the_weakest_strength_within_a_standard_error_of_the_best_is_taken(classifier):
    model, plan, batches = classifier
    statistics, held_out = collect(model, batches[:10]), batches[10:]
    found = choose_strength(model, plan, statistics, iter(held_out))
    rows = {None: by_row(model, prune(model, plan), held_out)}
    for ridge in (10.0, 1.0, 0.1, 0.01):
        rows[ridge] = by_row(model, prune(model, plan, statistics, ridge=ridge), held_out)
    assert found.losses == pytest.approx({ridge: its.mean() for ridge, its in rows.items()}, rel=1e-3)
    least = min(rows.values(), key=np.mean)
    near = [k for k, its in rows.items() if (its - least).mean() <= np.std(its - least, ddof=1) / np.sqrt(len(least))]
    assert found.ridge == near[0] and found.rows == len(least) == 32 and tuple(rows) == RIDGES


def test_neurons_that_follow_from_the_kept_ones_are_compensated(classifier):
    """Twice the same neurons: half of them are enough."""
    model, batches = tiny_model(layers=2), classifier[2]
    with torch.no_grad():
        for layer, (_, down) in zip(model.base_model.encoder.layer, linears_in(model), strict=True):
            half = down.weight.shape[1] // 2
            for weight in (layer.intermediate.dense.weight, layer.intermediate.dense.bias):
                weight[half:] = weight[:half]
            down.weight.mul_(10)
    plan = plan_of(model, [(i, range(4), range(half)) for i in range(2)])
    found = choose_strength(model, plan, collect(model, batches[:10]), batches[10:])
    assert found.ridge is not None and found.ridge < 1
    assert found.losses[found.ridge] < 0.01 * found.losses[None]


def test_compensation_that_does_harm_is_left_out(classifier):
    """Fitted to inputs of another model's, whose neurons are correlated in other ways."""
    model, plan, batches = classifier
    other = tiny_model(layers=4, seed=5)
    with torch.no_grad():
        for layer in other.base_model.encoder.layer:
            layer.intermediate.dense.weight.mul_(50)
    statistics = collect(other, batches[:2])
    found = choose_strength(model, plan, statistics, batches[10:])
    assert found.ridge is None
    assert found.losses[0.01] > found.losses[None]
    assert same(prune(model, plan, statistics, ridge=found.ridge), prune(model, plan))
    line = described(found.record())
    assert line.startswith("no compensation: divergence on 32 held-out rows ") and "without" in line


def test_linears_fitted_in_order_are_tried_after_the_others():
    """The choice is by the same rule; here what is fitted in order is nearer to the dense model by far."""
    model = family_model("llama", num_hidden_layers=3)
    plan = plan_pruning(model, random_scores(counts_of(model)), 0.5)
    batches = [family_batch(model, batch=16, seed=seed) for seed in range(5)]
    fitted_to, held_out = batches[:4], batches[4:]
    statistics = collect_statistics(model, fitted_to, "kl")
    found = choose_strength(model, plan, statistics, held_out, in_order=iter(fitted_to))
    assert tuple(found.losses) == (*RIDGES, *IN_ORDER)
    rows = {way: row_divergences(model, prune_in_order(model, plan, fitted_to, way), held_out) for way in IN_ORDER}
    rows |= {
        ridge: row_divergences(model, prune(model, plan, statistics, ridge=ridge), held_out)
        for ridge in reversed(RIDGES)
    }
    assert found.losses == pytest.approx({way: float(its.mean()) for way, its in rows.items()}, rel=1e-3)
    least = min(rows.values(), key=lambda its: float(its.mean())).numpy()
    more = {way: its.numpy() - least for way, its in rows.items()}
    near = [way for way in found.losses if more[way].mean() <= np.std(more[way], ddof=1) / np.sqrt(len(least))]
    assert near[0] in IN_ORDER and (found.in_order, found.ridge) == (near[0], None) and found.compensates
    without = choose_strength(model, plan, None, held_out, in_order=fitted_to)
    assert tuple(without.losses) == (None, *IN_ORDER), "nothing else takes over"


@pytest.mark.parametrize(
    ("ridge", "how", "words"),
    [
        (
            None,
            InOrder(1.0, 0.5),
            "compensated in order, ridge 1, share 0.5: divergence on 8 held-out rows 0.5 without, 0.2",
        ),
        (0.1, None, "compensated with ridge 0.1: divergence on 8 held-out rows 0.5 without, 0.4"),
        (None, None, "no compensation: divergence on 8 held-out rows 0.5 without, 0.2"),
    ],
)
def test_a_record_says_what_was_chosen(ridge, how, words):
    strength = Strength(ridge, {None: 0.5, 0.1: 0.4, InOrder(1.0, 0.5): 0.2}, 8, how)
    record = strength.record()
    assert record["divergence"] == {"none": 0.5, "0.1": 0.4, "in order, ridge 1, share 0.5": 0.2}
    assert (record["ridge"], record.get("share")) == ((1.0, 0.5) if how else (ridge, None))
    assert described(record).startswith(words) and strength.compensates == (ridge is not None or how is not None)


@pytest.mark.parametrize(
    ("ridge", "losses", "words"),
    [
        (1.0, {1.0: 0.25}, "compensated with ridge 1: divergence on 8 held-out rows not finite without, 0.25 with it"),
        (None, {None: 0.5}, "no compensation: divergence on 8 held-out rows 0.5 without, not finite with it"),
    ],
)
def test_a_record_of_ways_that_gave_no_finite_outputs_has_words_too(ridge, losses, words):
    assert described(Strength(ridge, losses, 8).record()) == words


def test_without_rows_nothing_is_chosen(classifier):
    model, plan, batches = classifier
    with pytest.raises(InputError, match="held_out"):
        choose_strength(model, plan, collect(model, batches[:2]), [])


def test_a_cut_fits_to_four_batches_in_five_and_chooses_by_the_fifth(tmp_path):
    model = tiny_model(layers=3)
    batches = Counted(model, 10)
    cut = cutter(tmp_path, batches).cut(model, model, 0.5)
    fitted = [batch for i, batch in enumerate(batches.batches) if i not in (4, 9)]
    statistics = collect_statistics(model, fitted)
    (strength,) = cut.strengths
    expected = choose_strength(model, cut.plan, statistics, [batches.batches[4], batches.batches[9]])
    assert (strength.ridge, strength.rows) == (expected.ridge, expected.rows)
    assert strength.losses == pytest.approx(expected.losses, rel=1e-3)
    by_hand = prune(model, cut.plan, statistics, ridge=expected.ridge)
    for one, other in zip(cut.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert cut.compensated == (expected.ridge is not None)
    assert not cutter(tmp_path, Counted(model, 4)).cut(model, model, 0.5).strengths, "no row to spare"
    assert not cutter(tmp_path, batches, compensate=False).cut(model, model, 0.5).strengths


@pytest.mark.parametrize(("ridge", "words"), [(0.1, "compensated with ridge 0.1"), (None, "no compensation")])
def test_the_line_of_a_round_says_what_was_chosen(ridge, words):
    record = {"ridge": ridge, "rows": 256, "divergence": {"none": 0.5, "1": 0.3, "0.1": 0.25}}
    result = {"layer_params_kept": 0.5, "score_pruned": 0.8, "score_compensated": 0.9, "compensation": [record]}
    result |= {"pruned": {"score": 0.8}, "compensated": {"score": 0.9}}
    stage = SimpleNamespace(run=SimpleNamespace(named=lambda metrics: f"accuracy {metrics['score']:.4f}"))
    line = ", ".join(Prune.line(stage, result))
    assert f"{words}: divergence on 256 held-out rows 0.5 without, 0.25 with it" in line


def test_no_strength_is_plain_removal_of_whole_layers_too():
    model = family_model("llama")
    rows = tuple(LayerPlan(i, range(4), range(64)) for i in (0, 1, 4))
    plan = PruningPlan("llama", rows)
    bypasses = fit_bypasses(model, plan, [family_batch(model)])
    assert bypasses and not same(prune(model, plan, bypasses=bypasses), prune(model, plan))
    assert same(prune(model, plan, bypasses=bypasses, ridge=None), prune(model, plan))
