"""Relations between examples, channels and layers against loops over numbers in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.processes import run_script
from builders.trainers import NO_DROPOUT, causal_model, rows, step_gradient, trainer_of

from distill_llm.common.errors import InputError
from distill_llm.losses.examples import pooled
from distill_llm.losses.mapping import LayerPair
from distill_llm.losses.matching import Match, MatchSettings
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.signals import EMBEDDINGS, Batch, Signals
from distill_llm.losses.terms.term import Use

RANDOM = np.random.default_rng(0)
OWN, SOURCE = RANDOM.normal(size=(5, 4)), RANDOM.normal(size=(5, 7))
NAMES = ("rkd_distance", "rkd_angle", "similarity", "correlation")


def term_of(name, **settings):
    return parse_objective({name: settings}).terms()[name]


def huber(a, b):
    return (a - b) ** 2 / 2 if abs(a - b) < 1 else abs(a - b) - 0.5


def unit(x):
    return x / math.sqrt((x**2).sum())


def by_loops(name, s, t):
    count = range(len(s))
    if name == "rkd_distance":
        both = []
        for z in (s, t):
            far = {(i, j): math.sqrt(((z[i] - z[j]) ** 2).sum()) for i, j in itertools.combinations(count, 2)}
            mean = sum(far.values()) / len(far)
            both.append([value / mean for value in far.values()])
        return np.mean([huber(a, b) for a, b in zip(*both, strict=True)])
    if name == "rkd_angle":
        values = []
        for i, j, k in itertools.permutations(count, 3):
            values.append(huber(*(unit(z[i] - z[j]) @ unit(z[k] - z[j]) for z in (s, t))))
        return np.mean(values)
    if name == "similarity":
        grams = [np.stack([unit(np.array([z[i] @ z[j] for j in count])) for i in count]) for z in (s, t)]
        return ((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2
    kernels = [
        [[math.exp(-0.4 * ((unit(z[i]) - unit(z[j])) ** 2).sum()) for j in count] for i in count] for z in (s, t)
    ]
    return ((np.array(kernels[0]) - np.array(kernels[1])) ** 2).mean()


@pytest.mark.parametrize("name", NAMES)
def test_relations_of_examples_are_those_of_loops(name):
    student = torch.tensor(OWN, requires_grad=True)
    value = term_of(name).of_examples(student, torch.tensor(SOURCE))
    assert float(value) == pytest.approx(by_loops(name, OWN, SOURCE), rel=1e-9)
    assert torch.autograd.gradcheck(lambda z: term_of(name).of_examples(z, torch.tensor(SOURCE)), student)


@pytest.mark.parametrize("name", NAMES)
def test_equal_and_empty_states_and_few_examples_have_slopes_of_ordinary_size(name):
    """A pair without a direction has a slope of 0, not one of 1e12."""
    pair, zero = torch.randn(4, 6), torch.randn(4, 6)
    pair[1], zero[1] = pair[0], 0
    for states in (pair, zero, *(torch.ones(count, 6) for count in (1, 2, 3))):
        student = states.requires_grad_()
        (slope,) = torch.autograd.grad(term_of(name).of_examples(student, torch.randn(len(states), 7)), student)
        assert slope.abs().max() < 1


EQUAL: dict = {name: {} for name in (*NAMES, "channels", "flow", "gradients", "focal")}
EQUAL |= {"own_temperature": {"by": "entropy"}, "logits": {"divergence": "probability_mse"}}


@pytest.mark.parametrize("make", [tiny_model, pytest.param(causal_model, marks=pytest.mark.slow)])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, make):
    """Two of the rows are the same: they are at a distance of 0 in both models."""
    teacher = make(layers=2, **(NO_DROPOUT if make is tiny_model else {}))
    data = rows(teacher)
    data[1] = data[0]
    gradients, log = step_gradient(tmp_path, teacher, teacher, data, EQUAL)
    assert all(abs(log[f"loss/{name}"]) < 1e-7 for name in EQUAL)
    assert all(each.abs().max() < 1e-3 for each in gradients.values())


def test_rotation_and_scale_change_no_distance_and_no_angle():
    turned = torch.tensor(3 * OWN @ np.linalg.qr(RANDOM.normal(size=(4, 4)))[0])
    for name in ("rkd_distance", "rkd_angle", "similarity", "correlation"):
        assert float(term_of(name).of_examples(turned, torch.tensor(OWN))) == pytest.approx(0, abs=1e-12)


def test_the_state_of_an_example_is_of_its_valid_tokens_on_either_side():
    states = torch.arange(24.0).reshape(2, 4, 3)
    valid = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
    expected = {
        "first": [states[0, 0], states[1, 1]],
        "last": [states[0, 1], states[1, 3]],
        "mean": [states[0, :2].mean(0), states[1, 1:].mean(0)],
    }
    for pool, rows_ in expected.items():
        assert torch.equal(pooled(states, valid, pool), torch.stack(rows_))


def of_models(name, **settings):
    """The sum of a term for two models of a width, and their states in float64, by layer, of a padded batch."""
    models = tiny_model(layers=2, hidden=16), tiny_model(layers=4, hidden=16, seed=1)
    batch = random_batch(models[0])
    states = [model(**batch, output_hidden_states=True).hidden_states for model in models]
    signals = [Signals({i - 1: each for i, each in enumerate(own)}, logits=torch.zeros(4, 2)) for own in states]
    match, term = Match(*models, MatchSettings()), term_of(name, **settings)
    made = Batch(signals[1], None, batch["attention_mask"], student=signals[0])
    total = float(term.sum(made, match, term.layer_pairs(match)))
    return total, [[each.double().detach().numpy() for each in own] for own in states], batch["attention_mask"].sum(1)


def test_channels_correlate_over_the_tokens_of_each_example():
    total, (own, source), lengths = of_models("channels")
    expected = 0.0
    for row, length in enumerate(lengths.tolist()):
        cosines = []
        for states in (own[2][row, :length], source[4][row, :length]):
            cosines.append([[unit(states[:, a]) @ unit(states[:, b]) for b in range(16)] for a in range(16)])
        expected += ((np.array(cosines[0]) - np.array(cosines[1])) ** 2).mean()
    assert total == pytest.approx(expected, rel=1e-4)


def test_flow_is_the_product_of_a_layers_channels_with_the_nexts_over_tokens():
    """Uniform: two flows, from the embeddings to layers 0 and 1 of the teacher's four, then to layers 1 and 3."""
    total, (own, source), lengths = of_models("flow")
    expected = 0.0
    for row, length in enumerate(lengths.tolist()):
        for (a, b), (c, d) in (((0, 1), (0, 2)), ((1, 2), (2, 4))):
            flows = []
            for states, first, last in ((own, a, b), (source, c, d)):
                flow = np.zeros((16, 16))
                for token in range(length):
                    flow += np.outer(states[first][row, token], states[last][row, token]) / length
                flows.append(flow)
            expected += ((flows[0] - flows[1]) ** 2).mean() / 2
    assert total == pytest.approx(expected, rel=1e-4)
    assert term_of("flow").layer_pairs(Match(tiny_model(layers=2), tiny_model(layers=4), MatchSettings())) == [
        LayerPair(EMBEDDINGS, EMBEDDINGS),
        LayerPair(0, 1),
        LayerPair(1, 3),
    ]


@pytest.mark.parametrize("name", ["similarity", "channels"])
def test_several_pairs_of_layers_have_the_mean_of_their_values(name):
    both, *each = (of_models(name, layers=pairs)[0] for pairs in ([[0, 1], [1, 3]], [[0, 1]], [[1, 3]]))
    assert both == pytest.approx(sum(each) / 2, rel=1e-5) and each[0] != each[1]


def test_examples_are_related_within_a_micro_batch(tmp_path):
    """Two micro-batches of four give the mean of their own values; one of eight another value: as the page says."""
    student, teacher = tiny_model(layers=1, hidden=16, **NO_DROPOUT), tiny_model(layers=2, seed=1)
    data, losses = rows(student), {}
    for size in (8, 4):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        objective = {"rkd_distance": {"pool": "first"}}
        trainer = trainer_of(tmp_path / str(size), student, teacher, data, objective, learning_rate=0.0, **sizes)
        order = list(trainer._get_train_sampler())
        trainer.train()
        losses[size] = trainer.state.log_history[0]["loss/rkd_distance"]
    outputs = []
    for model in (student.eval(), teacher.eval()):
        with torch.no_grad():
            batch = {name: torch.stack([data[i][name] for i in order]) for name in ("input_ids", "attention_mask")}
            outputs.append(model(**batch, output_hidden_states=True).hidden_states[-1][:, 0].double().numpy())
    halves = [by_loops("rkd_distance", *(each[part] for each in outputs)) for part in (slice(4), slice(4, 8))]
    assert losses[8] == pytest.approx(by_loops("rkd_distance", *outputs), rel=1e-4)
    assert losses[4] == pytest.approx(sum(halves) / 2, rel=1e-4) and abs(losses[4] - losses[8]) > 1e-3


def test_a_row_alone_is_related_with_nothing_and_refused(tmp_path):
    student, teacher = tiny_model(layers=1), tiny_model(layers=2, seed=1)
    with pytest.raises(
        InputError, match="losses.similarity.over: got 'micro_batch, with rows at once: 1'; accepted: 2"
    ):
        trainer_of(tmp_path, student, teacher, rows(student), {"similarity": {}}, per_device_train_batch_size=1)


@pytest.mark.slow
def test_processes_with_unequal_numbers_of_rows_relate_them_all(tmp_path):
    """The values of two processes with 4 rows and 1 add up to that of 5 rows, and so do their gradients in a weight."""
    torch.save([torch.tensor(each) for each in (OWN, SOURCE)], tmp_path / "states.pt")
    run_script("relate_in_processes.py", tmp_path, *NAMES, processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name in NAMES:
        weight = torch.eye(4, dtype=torch.float64, requires_grad=True)
        value = 5 * term_of(name).of_examples(torch.tensor(OWN) @ weight, torch.tensor(SOURCE))
        (slope,) = torch.autograd.grad(value, weight)
        assert float(value) == pytest.approx(5 * by_loops(name, OWN, SOURCE), rel=1e-9)
        torch.testing.assert_close(first[name][0] + second[name][0], value.detach())
        torch.testing.assert_close(first[name][1] + second[name][1], slope)


def test_settings_that_do_not_exist_are_named():
    with pytest.raises(InputError, match="losses.rkd_angle.pool"):
        parse_objective({"rkd_angle": {"pool": "max"}})
    (fault,) = parse_objective({"flow": {}}).faults(Use(packed="data.packing"))
    assert fault.field == "losses.flow"
