"""Several teachers at once: the mean of their outputs against numpy, classes matched by name, what is refused."""

import copy
import re

import numpy as np
import pytest
import torch
from builders.grids import slow
from builders.models import tiny_model
from builders.recipes import faults_at_the_door, recipe_with, write_model, write_rows
from builders.trainers import NO_DROPOUT, causal_model, rows, trainer_of
from torch.nn import functional as F

from distill_llm.common.errors import InputError
from distill_llm.losses.signals import Wanted
from distill_llm.recipe.recipe import parse_recipe
from distill_llm.teachers import Ensemble

NAMES = ("no", "maybe", "yes")
WAYS = [("probabilities", False), *slow(("logits", False), ("probabilities", True), ("logits", True))]


def named(names) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}


def classifier(names=NAMES, **model):
    return tiny_model(num_labels=len(names), **NO_DROPOUT, **named(names), **model)


def batch_of(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0] if name != "labels"}


def numbers(model, batch) -> np.ndarray:
    with torch.no_grad():
        return model(**batch).logits.double().numpy()


def softmax(z: np.ndarray) -> np.ndarray:
    powers = np.exp(z)
    return powers / powers.sum(-1, keepdims=True)


def mean(outputs: list[np.ndarray], weights: list[float], average: str, confidence: bool) -> np.ndarray:
    """The distribution that is taught, example by example."""
    taught = np.empty_like(outputs[0])
    for at in np.ndindex(taught.shape[:-1]):
        each = [softmax(z[at]) for z in outputs]
        own = [w * (np.prod(p**p) if confidence else 1) for w, p in zip(weights, each, strict=True)]
        values = each if average == "probabilities" else [z[at] for z in outputs]
        found = sum(w * value for w, value in zip(own, values, strict=True)) / sum(own)
        taught[at] = found if average == "probabilities" else softmax(found)
    return taught


def logged(trainer) -> float:
    trainer.train()
    return trainer.state.log_history[0]["loss/logits"]


@pytest.mark.parametrize(("average", "confidence"), WAYS)
def test_the_student_learns_from_the_weighted_mean_with_classes_matched_by_name(tmp_path, average, confidence):
    turned = ("YES", "no", "Maybe")  # where the student's classes are: 1, 2, 0
    teachers = [classifier(layers=3, seed=1), classifier(turned, layers=2, seed=2), classifier(layers=2, seed=3)]
    student = classifier(layers=2, seed=4)
    data = rows(student)
    batch = batch_of(data)
    outputs = [numbers(teacher, batch) for teacher in teachers]
    outputs[1] = outputs[1][:, [1, 2, 0]]
    target = mean(outputs, [2, 1, 5], average, confidence)
    own = np.log(softmax(numbers(student, batch)))
    expected = (target * (np.log(target) - own)).sum(-1).mean()
    ensemble = Ensemble(teachers, [2, 1, 5], average, confidence)
    assert ensemble.weights == pytest.approx([0.25, 0.125, 0.625])
    assert logged(trainer_of(tmp_path, student, ensemble, data, {"logits": {}})) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("average", ["probabilities", "logits"])
def test_a_first_model_of_weight_0_that_rules_out_a_class_says_nothing(average):
    """It is read all the same, for its layers."""
    models = [classifier(layers=2, seed=seed) for seed in (1, 2, 3)]
    with torch.no_grad():
        models[0].classifier.bias[1] = -torch.inf
    batch = batch_of(rows(models[0]))
    target = mean([numbers(model, batch) for model in models[1:]], [1, 3], average, False)
    ensemble = Ensemble(models, [0, 1, 3], average)
    ensemble.agree()
    ensemble.place(torch.device("cpu"), layers=Wanted(hidden=frozenset({1})))
    found = ensemble.signals(batch)
    assert softmax(found.logits.double().numpy()) == pytest.approx(target, rel=1e-5)
    assert found.hidden


@pytest.mark.slow
def test_a_temperature_divides_the_mean(tmp_path):
    teachers, student = [classifier(layers=2, seed=seed) for seed in (1, 2)], classifier(layers=2, seed=4)
    data = rows(student)
    batch = batch_of(data)
    middle = np.log(sum(softmax(numbers(teacher, batch)) for teacher in teachers) / 2)
    target, own = softmax(middle / 2), np.log(softmax(numbers(student, batch) / 2))
    expected = 2**2 * (target * (np.log(target) - own)).sum(-1).mean()
    trainer = trainer_of(tmp_path, student, Ensemble(teachers), data, {"logits": {"temperature": 2.0}})
    assert logged(trainer) == pytest.approx(expected, rel=1e-4)


def test_classes_of_a_student_without_names_are_those_of_the_first_model_that_has_some(tmp_path):
    teachers = [classifier(layers=2, seed=1), classifier(NAMES[::-1], layers=2, seed=2)]
    student = tiny_model(num_labels=3, layers=2, seed=4, **NO_DROPOUT)
    data = rows(student)
    batch = batch_of(data)
    outputs = [numbers(teachers[0], batch), numbers(teachers[1], batch)[:, ::-1]]
    target, own = mean(outputs, [1, 1], "probabilities", False), np.log(softmax(numbers(student, batch)))
    expected = (target * (np.log(target) - own)).sum(-1).mean()
    assert logged(trainer_of(tmp_path, student, Ensemble(teachers), data, {"logits": {}})) == pytest.approx(
        expected, rel=1e-4
    )


@pytest.mark.slow
def test_losses_of_layers_compare_with_the_first(tmp_path):
    teachers, student = [classifier(layers=2, seed=seed) for seed in (1, 2)], classifier(layers=2, seed=4)
    data, losses = rows(student), {"logits": {}, "hidden": {"layers": "uniform"}, "attention": {"layers": "uniform"}}
    found = []
    for teacher in (Ensemble(teachers), teachers[0]):
        trainer = trainer_of(tmp_path, copy.deepcopy(student), teacher, data, losses)
        trainer.train()
        found.append(trainer.state.log_history[0])
    for name in ("loss/hidden", "loss/attention"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-6)
    assert abs(found[0]["loss/logits"] - found[1]["loss/logits"]) > 1e-3


@pytest.mark.parametrize("losses", [{"logits": {}}, {"hidden": {"layers": "uniform"}}], ids=["outputs", "layers"])
def test_language_models_with_unequal_padding_of_one_vocabulary(tmp_path, losses):
    class Tokenizer:
        pad_token_id = 0

        def get_vocab(self):
            return {str(number): number for number in range(90)}

        def __len__(self):
            return 90

    teachers = [causal_model(layers=2, seed=1), causal_model(layers=2, seed=2, vocab_size=96)]
    student = causal_model(layers=2, seed=3)
    data = [
        {name: tensor % 90 if name == "input_ids" else tensor for name, tensor in row.items()} for row in rows(student)
    ]
    data = [{**row, "labels": torch.where(row["labels"] < 0, -100, row["input_ids"])} for row in data]
    batch, labels = batch_of(data), torch.stack([row["labels"] for row in data])
    counts = labels[:, 1:] != -100
    outputs = [torch.tensor(numbers(model, batch))[:, :-1, :90][counts].numpy() for model in (student, *teachers)]
    target, own = mean(outputs[1:], [1, 3], "probabilities", False), np.log(softmax(outputs[0]))
    expected = (target * (np.log(target) - own)).sum(-1).mean()
    trainer = trainer_of(
        tmp_path, student, Ensemble(teachers, [1, 3]), data, losses, processing_class=Tokenizer(), max_steps=1
    )
    trainer.train()
    if "logits" in losses:
        assert trainer.state.log_history[0]["loss/logits"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_regression_learns_from_the_mean_of_values(tmp_path):
    teachers = [tiny_model(num_labels=1, layers=2, seed=seed, **NO_DROPOUT) for seed in (1, 2)]
    student = tiny_model(num_labels=1, layers=2, seed=4, **NO_DROPOUT)
    data = [{**row, "labels": torch.tensor(1.0)} for row in rows(student)]
    batch = batch_of(data)
    target = 0.75 * numbers(teachers[0], batch) + 0.25 * numbers(teachers[1], batch)
    expected = F.mse_loss(torch.tensor(target), torch.tensor(numbers(student, batch))).item()
    losses = {"logits": {"divergence": "mse"}}
    assert logged(trainer_of(tmp_path, student, Ensemble(teachers, [3, 1]), data, losses)) == pytest.approx(
        expected, rel=1e-4
    )
    with pytest.raises(InputError, match="^confidence: "):
        trainer_of(tmp_path, student, Ensemble(teachers, confidence=True), data, losses)


@pytest.mark.slow
def test_a_resumed_training_ends_with_the_same_weights(tmp_path):
    teachers, student = [classifier(layers=2, seed=1), classifier(NAMES[::-1], layers=2, seed=2)], classifier(layers=2)
    data, settings = rows(student, count=16), {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def trained(resume=None):
        own = copy.deepcopy(student)
        trainer_of(tmp_path, own, Ensemble(teachers, [1, 2]), data, {"logits": {}}, **settings).train(
            resume_from_checkpoint=resume
        )
        return list(own.parameters())

    whole, again = trained(), trained(str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda one: Ensemble([one]), "models: got '1 models'"),
        (lambda one: Ensemble([one, one], [1]), "weights: got [1]"),
        (lambda one: Ensemble([one, one], [1, -1]), "weights: got [1, -1]"),
        (lambda one: Ensemble([one, one], [0, 0]), "weights: got [0, 0]; accepted: at least one above 0"),
        (lambda one: Ensemble([one, one], average="maximum"), "average: got 'maximum'"),
        (lambda one: Ensemble([one, classifier(("no", "maybe", "oui"))]), "models.1: .*labels .*in any order"),
        (lambda one: Ensemble([one, classifier(("no", "yes"))]), "models.1: got '2 labels'"),
        (lambda one: Ensemble([one, classifier(vocab=90)]), "models.1: got 'a vocabulary of 90 entries'"),
        (lambda one: Ensemble([one, causal_model()]), "models.1: got 'LlamaForCausalLM'"),
    ],
    ids=["one", "count", "negative", "zero", "average", "names", "classes", "vocabulary", "head"],
)
def test_models_that_cannot_teach_together_are_refused(tmp_path, make, message):
    student = classifier(layers=2, seed=4)
    with pytest.raises(InputError) as caught:
        trainer_of(tmp_path, student, make(classifier()), rows(student), {"logits": {}})
    assert (
        re.match(message.replace("[1", r"\[1").replace("[0", r"\[0"), str(caught.value))
        and len(str(caught.value)) < 300
    )


def test_gradients_in_hidden_states_are_refused(tmp_path):
    student = classifier(layers=2, seed=4)
    with pytest.raises(InputError, match=r"^losses.gradients: got 'an ensemble'"):
        trainer_of(tmp_path, student, Ensemble([classifier(), classifier(seed=1)]), rows(student), {"gradients": {}})


@pytest.fixture
def folder(tmp_path):
    """A teacher, another with its classes turned round, and rows."""
    write_model(tmp_path / "teacher", **named(("neg", "pos")))
    write_model(tmp_path / "second", seed=1, layers=2, **named(("POS", "neg")))
    write_rows(tmp_path / "rows.csv")
    return tmp_path


@pytest.mark.slow
def test_the_door_takes_classes_in_any_order_and_refuses_what_cannot_teach_together(folder):
    def faults(name="second", **changes):
        ensemble = {"others": [{"model": str(folder / name)}]}
        return faults_at_the_door(recipe_with(folder, **{"teacher__ensemble": ensemble, **changes}))

    field = "teacher.ensemble.others.0.model: got "
    assert faults() == []
    write_model(folder / "names", **named(("good", "bad")))
    write_model(folder / "more", num_labels=3)
    write_model(folder / "words", words=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "das", "Wort"])
    write_model(folder / "head", head="masked-lm")
    write_model(folder / "short", max_position_embeddings=8)
    for name, what in {
        "names": "labels ['neg', 'pos'], in any order",
        "more": "a model with 2 labels",
        "words": "a model with the tokenizer of teacher.model",
        "head": "a ...ForSequenceClassification model",
        "gone": "",
    }.items():
        (line,) = faults(name)
        assert line.startswith(field) and what in line and len(line) <= 300
    assert any("short" in line and line.startswith("data.max_length") for line in faults("short"))
    (line,) = faults(distillation__losses={"gradients": {}, "logits": {}})
    assert line.startswith("distillation.losses.gradients: got 'an ensemble'")


def test_the_recipe_refuses_an_ensemble_that_would_not_be_asked(folder):
    ensemble = {"others": [{"model": "second"}]}
    with pytest.raises(InputError, match="^teacher.ensemble: .*logits"):
        recipe_with(folder, teacher__ensemble=ensemble, distillation__losses={"hidden": {}})
    with pytest.raises(InputError, match=r"^teacher.ensemble.others.0.weight: "):
        recipe_with(folder, teacher__ensemble={"others": [{"model": "second", "weight": 0}]})
    with pytest.raises(InputError, match=r"^teacher.ensemble.others: "):
        recipe_with(folder, teacher__ensemble={"others": []})
    recipe = recipe_with(folder, teacher__ensemble=ensemble)
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe
