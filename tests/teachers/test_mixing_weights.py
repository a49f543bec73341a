"""Weights of several teachers, learnt on held-out rows: against scipy's optimiser, for every mean and kind of output."""

import numpy as np
import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, causal_model, rows
from scipy.optimize import minimize

from distill_llm.common.errors import InputError
from distill_llm.teachers import Ensemble
from distill_llm.teachers.mixing_weights import learn_weights, likeliest_mixture, projected, rounded

NAMES = ("no", "maybe", "yes")


def best(loss, count: int) -> tuple[np.ndarray, float]:
    """The least of a function on the simplex, by another method."""
    found = [
        minimize(
            loss,
            start,
            method="SLSQP",
            bounds=[(0, 1)] * count,
            options={"ftol": 1e-14, "maxiter": 2000},
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        )
        for start in (np.full(count, 1 / count), np.eye(count)[0] * 0.8 + 0.2 / count)
    ]
    least = min(found, key=lambda each: each.fun)
    return least.x, least.fun


def named(names) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}


def classifier(seed, names=NAMES, labels=3):
    own = named(names) if labels > 1 else {}
    return tiny_model(num_labels=labels, layers=2, seed=seed, **NO_DROPOUT, **own)


def batches_of(data):
    """Two batches of uneven size."""
    parts = [data[:13], data[13:]]
    return lambda: [{name: torch.stack([row[name] for row in part]) for name in part[0]} for part in parts]


def numbers(model, data) -> np.ndarray:
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0] if name != "labels"}
    with torch.no_grad():
        return model(**batch).logits.double().numpy()


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_what_no_model_thinks_possible_says_nothing_about_the_weights():
    log_p = torch.tensor([[0.2, 0.8], [0.5, 0.1], [0.3, 0.4], [0.6, 0.2], [0.0, 0.5]], dtype=torch.float64).log()
    nowhere = torch.full((2, 2), -torch.inf, dtype=torch.float64)
    torch.testing.assert_close(likeliest_mixture(torch.cat([nowhere, log_p])), likeliest_mixture(log_p))
    assert likeliest_mixture(nowhere).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("seed", range(3))
def test_the_mixture_is_the_likeliest_one_also_at_the_border(seed):
    random = np.random.default_rng(seed)
    p = random.dirichlet(np.ones(5), size=(200, 3))[..., 0]
    p[:, 2] *= (0.01, 0.7, 1.0)[seed]  # a model that is of no use, of little, of some
    weights, least = best(lambda w: -np.log(p @ w).mean(), 3)
    got = likeliest_mixture(torch.tensor(np.log(p)))
    assert got.sum().item() == pytest.approx(1) and got.min() >= 0
    assert -np.log(p @ got.numpy()).mean() <= least + 2e-7
    assert got.numpy() == pytest.approx(weights, abs=2e-3)


def test_the_nearest_weights_and_their_rounding():
    assert projected(torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist() == [0.5, 0.5]
    assert projected(torch.tensor([2.0, 0.0, -5.0], dtype=torch.float64)).tolist() == [1.0, 0.0, 0.0]
    assert projected(torch.tensor([0.6, 0.8, 0.1], dtype=torch.float64)).numpy() == pytest.approx([0.4, 0.6, 0.0])
    assert rounded(torch.tensor([1 / 3, 1 / 3, 1 / 3], dtype=torch.float64)).tolist() == [0.3334, 0.3333, 0.3333]


@pytest.mark.slow
@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_weights_of_classifiers_are_those_of_least_loss_with_classes_matched_by_name(average):
    turned = ("YES", "no", "Maybe")
    models = [classifier(1), classifier(2, turned), classifier(3)]
    data = rows(models[0], count=40)
    labels = np.array([row["labels"].item() for row in data])
    outputs = [numbers(model, data) for model in models]
    outputs[1] = outputs[1][:, [1, 2, 0]]
    z = np.stack([3 * each for each in outputs], 1)  # (rows, models, classes)
    with torch.no_grad():
        for model in models:
            model.classifier.weight.mul_(3), model.classifier.bias.mul_(3)
    at = np.arange(len(labels))

    def loss(w):
        if average == "logits":
            return -log_softmax(np.einsum("imc,m->ic", z, w))[at, labels].mean()
        return -np.log((np.exp(log_softmax(z))[at, :, labels] * w).sum(-1)).mean()

    weights, least = best(loss, 3)
    ensemble = Ensemble(models, average=average)
    ensemble.agree()
    found = learn_weights(ensemble, batches_of(data))
    assert found.loss == pytest.approx(loss(np.array(found.weights)), rel=1e-5)
    assert found.loss <= least + 1e-5 and found.items == 40
    assert found.weights == pytest.approx(weights, abs=5e-3) and sum(found.weights) == pytest.approx(1)
    assert found.alone == pytest.approx([loss(each) for each in np.eye(3)], rel=1e-5)
    assert max(found.weights) < 0.999, "the case is not one of a single model"
    assert learn_weights(ensemble, batches_of(data)) == found


def ruled_out(classes_of_models, labels):
    """What is learnt of models that rule out classes, and the models' logits (rows, models, classes)."""
    models = [classifier(seed) for seed in (1, 2, 3)]
    with torch.no_grad():
        for model, classes in zip(models, classes_of_models, strict=True):
            model.classifier.weight.mul_(5)
            model.classifier.bias[list(classes)] = -torch.inf
    data = [
        {**row, "labels": torch.tensor(labels[at % len(labels)])} for at, row in enumerate(rows(models[0], count=40))
    ]
    ensemble = Ensemble(models, average="logits")
    ensemble.agree()
    z = np.stack([numbers(model, data) for model in models], 1)
    return learn_weights(ensemble, batches_of(data)), z, np.array([row["labels"].item() for row in data])


@pytest.mark.slow
@pytest.mark.parametrize("classes", [((2,), (2,), (2,)), ((2,), (), ())])
def test_a_class_that_a_model_of_any_weight_rules_out_is_left_out_of_the_mean_of_logits(classes):
    found, z, labels = ruled_out(classes, (0, 1, 1))
    two = z[..., :2]

    def loss(w):
        return -log_softmax(np.einsum("imc,m->ic", two, w))[np.arange(len(labels)), labels].mean()

    weights, least = best(loss, 3)
    assert found.loss == pytest.approx(loss(np.array(found.weights)), rel=1e-5)
    assert found.loss <= least + 1e-5 and found.weights == pytest.approx(weights, abs=5e-3)
    assert weights[0] > 0.01, "the first model has a weight"
    assert found.alone[0] == pytest.approx(loss(np.eye(3)[0]), rel=1e-5)


@pytest.mark.slow
def test_a_model_that_rules_out_a_label_has_no_weight_in_a_mean_of_logits():
    found, z, labels = ruled_out(((), (2,), ()), (0, 1, 2))
    rest = z[:, [0, 2]]

    def loss(w):
        return -log_softmax(np.einsum("imc,m->ic", rest, w))[np.arange(len(labels)), labels].mean()

    weights, least = best(loss, 2)
    assert found.weights[1] == 0 and found.alone[1] == np.inf
    assert found.loss <= least + 1e-5 and found.weights[::2] == pytest.approx(weights, abs=5e-3)
    with pytest.raises(InputError, match="^average: got 'logits'; take probabilities: each model gives a label"):
        ruled_out(((0,), (1,), (2,)), (0, 1, 2))


@pytest.mark.slow
def test_classes_without_names_are_in_the_order_of_the_labels():
    """The first model has no names, and the second has the data's in another order."""
    models = [classifier(1, ("LABEL_0", "LABEL_1", "LABEL_2")), classifier(2, ("yes", "no", "maybe"))]
    data = rows(models[0], count=40)
    z = numbers(models[1], data)[:, [1, 2, 0]]
    labels = z.argmax(-1)  # by which the second is right in all
    data = [{**row, "labels": torch.tensor(label)} for row, label in zip(data, labels, strict=True)]
    ensemble = Ensemble(models)
    ensemble.agree(names=NAMES)
    found = learn_weights(ensemble, batches_of(data))
    assert found.alone[1] == pytest.approx(-log_softmax(z)[np.arange(40), labels].mean(), rel=1e-5)
    assert found.weights[1] > 0.5


@pytest.mark.slow
def test_weights_of_regressions_are_those_of_least_squares():
    models = [classifier(seed, labels=1) for seed in (1, 2, 3)]
    values = np.stack([numbers(model, rows(models[0], count=40))[:, 0] for model in models], 1)
    target = values @ [0.6, 0.4, 0] + 0.05 * np.random.default_rng(0).normal(size=40)
    data = [
        {**row, "labels": torch.tensor(label, dtype=torch.float32)}
        for row, label in zip(rows(models[0], count=40), target, strict=True)
    ]
    weights, least = best(lambda w: ((values @ w - target) ** 2).mean(), 3)
    ensemble = Ensemble(models)
    ensemble.agree()
    found = learn_weights(ensemble, batches_of(data))
    assert found.weights == pytest.approx(weights, abs=2e-3) and found.loss == pytest.approx(least, rel=1e-3)


@pytest.mark.slow
def test_weights_of_language_models_count_labelled_tokens_alone():
    models = [causal_model(layers=1, seed=seed) for seed in (1, 2)]
    data = rows(models[0], count=20)
    labels = torch.stack([row["labels"] for row in data])[:, 1:].numpy()
    kept = labels != -100
    p = np.stack([np.exp(log_softmax(numbers(model, data)))[:, :-1] for model in models])
    chosen = np.take_along_axis(p, np.where(kept, labels, 0)[None, ..., None], -1)[..., 0][:, kept].T
    weights, least = best(lambda w: -np.log(chosen @ w).mean(), 2)
    ensemble = Ensemble(models)
    ensemble.agree()
    found = learn_weights(ensemble, batches_of(data))
    assert found.items == kept.sum() and found.loss == pytest.approx(least, rel=1e-5)
    assert found.weights == pytest.approx(weights, abs=2e-3)
    with pytest.raises(InputError, match="^average: got 'logits'"):
        learn_weights(Ensemble(models, average="logits"), batches_of(data))
    with pytest.raises(InputError, match="^confidence: got True"):
        learn_weights(Ensemble(models, confidence=True), batches_of(data))
    unlabelled = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in data]
    with pytest.raises(InputError, match="^batches: got 'no rows'"):
        learn_weights(ensemble, batches_of(unlabelled))


@pytest.mark.slow
def test_a_model_of_weight_0_is_not_read():
    models = [causal_model(layers=1, seed=seed) for seed in (1, 2, 3)]
    read = []
    for number, model in enumerate(models):
        model.register_forward_pre_hook(lambda *given, number=number: read.append(number))
    ensemble = Ensemble(models, [1, 0, 3])
    ensemble.meet(causal_model(layers=1, seed=4))
    batch = {"input_ids": torch.arange(20).view(2, 10)}
    got = ensemble.signals(batch, positions=torch.arange(20)).logits
    assert read == [0, 2]
    p = [model(input_ids=batch["input_ids"]).logits.flatten(0, 1).softmax(-1) for model in models]
    torch.testing.assert_close(got.exp(), 0.25 * p[0] + 0.75 * p[2])
