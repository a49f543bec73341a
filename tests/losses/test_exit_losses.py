"""The loss of exits against plain formulas, in float64, of a tiny BERT with three exits; and what is refused."""

import math

import numpy as np
import pytest
import torch
from builders.models import random_batch, tiny_model
from builders.trainers import NO_DROPOUT

from distill_llm import DistillationConfig, DistillationTrainer, InputError, with_exits
from distill_llm.losses.exits import ExitTargets, ExitWeights, exit_losses
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.signals import Exits, MixedLabels
from distill_llm.losses.terms.term import Use


def softmax(values):
    powers = [math.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def by_hand(model, batch, weights):
    """The loss of every example, from the states of layers that transformers itself gives, and the weights of the heads."""
    with torch.no_grad():
        plain = model(**{name: value for name, value in batch.items() if name != "labels"}, output_hidden_states=True)
    found = []
    for row in range(len(batch["labels"])):
        total, deepest = 0.0, plain.logits[row].double().tolist()
        last = plain.hidden_states[-1][row, 0].double().numpy()
        for after, head in zip(model.config.exits["after"], model.exit_heads, strict=True):
            first = plain.hidden_states[after][row, 0].double().numpy()
            parts = [each.detach().double().numpy() for each in head.parameters()]
            state = parts[0] @ first + parts[1]
            logits = (parts[2] @ np.tanh(state) + parts[3]).tolist()
            total += weights.labels * -math.log(softmax(logits)[batch["labels"][row]])
            p, q = (softmax([value / weights.temperature for value in each]) for each in (deepest, logits))
            divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
            total += weights.logits * weights.temperature**2 * divergence
            total += weights.hints * float(np.mean((state - last) ** 2))
        found.append(total / len(model.exit_heads))
    return found


def student(**more):
    model = with_exits(tiny_model(layers=4, num_labels=3, **NO_DROPOUT, **more), [1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.exit_heads.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return model


SETTINGS = [
    ExitWeights(0.5, 0.5, 0.05),
    ExitWeights(1.0, 0.0, 0.0),
    ExitWeights(0.0, 1.0, 0.0, 3.0),
    ExitWeights(0.0, 0.0, 2.0),
]


@pytest.mark.slow
@pytest.mark.parametrize("weights", SETTINGS)
def test_a_step_has_the_hand_computed_loss_of_three_exits(tmp_path, weights):
    model, batch = student(), random_batch(tiny_model(layers=4, num_labels=3), batch=6)
    expected = np.mean(by_hand(model, batch, weights))
    args = DistillationConfig(
        str(tmp_path),
        losses={"labels": {"weight": 0.0}, "exits": weights._asdict()},
        use_cpu=True,
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        logging_steps=1,
        learning_rate=0.0,
        report_to="none",
    )
    rows = [{name: value[row] for name, value in batch.items()} for row in range(6)]
    trainer = DistillationTrainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    log = next(each for each in trainer.state.log_history if "loss" in each)
    assert log["loss/exits"] == pytest.approx(expected, rel=1e-5)
    assert log["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", SETTINGS)
def test_the_deepest_head_is_the_teacher_and_every_weight_of_an_exit_gets_a_gradient(weights):
    model, batch = student().train(), random_batch(tiny_model(num_labels=3), batch=4)
    labels = batch.pop("labels")
    given = model(**batch)
    losses = exit_losses(Exits(given.exit_logits, given.exit_states), ExitTargets(given.logits, labels), weights)
    losses.sum().backward()
    assert all(each.grad is None for each in (*model.classifier.parameters(), *model.bert.pooler.parameters()))
    last = [each.grad for each in model.bert.encoder.layer[3].parameters()]  # only the last state reads it
    assert not any(each is not None and each.any() for each in last)
    assert all(each.grad is not None for each in model.exit_heads.parameters())
    assert model.bert.encoder.layer[0].output.dense.weight.grad.abs().max() > 0


def test_a_mixture_of_two_examples_is_held_against_both_labels_and_one_without_a_label_against_none():
    draw = torch.Generator().manual_seed(0)
    logits, states = torch.randn(3, 2, 4, generator=draw), torch.randn(3, 3, 5, generator=draw)
    deepest, labels = torch.randn(3, 4, generator=draw), torch.tensor([1, -100, 3])
    weights, other = ExitWeights(1.0, 0.0, 0.0), torch.tensor([0, -100, 2])
    exits = Exits(logits, states)
    one, two = (exit_losses(exits, ExitTargets(deepest, each), weights) for each in (labels, other))
    share = torch.tensor([0.25, 1.0, 0.75])
    mixed = exit_losses(exits, ExitTargets(deepest, labels, MixedLabels(other, share)), weights)
    torch.testing.assert_close(mixed, share * one + (1 - share) * two)
    assert one[1] == 0 and one[0] > 0
    smooth = exit_losses(exits, ExitTargets(deepest, labels, smoothing=0.5), weights)
    log_q = logits.log_softmax(-1)
    torch.testing.assert_close(smooth[0], -(0.5 * log_q[0, :, 1] + 0.5 * log_q[0].mean(-1)).mean())


@pytest.mark.parametrize(
    "losses, has, message",
    [
        ({"labels": {}, "exits": {}}, False, "losses.exits: got 'BertForSequenceClassification without exits'"),
        ({"labels": {}}, True, "losses: got 'ExitBertForSequenceClassification without a loss of its exits'"),
    ],
)
def test_exits_and_their_loss_come_together(tmp_path, losses, has, message):
    model = student() if has else tiny_model(num_labels=3)
    args = DistillationConfig(str(tmp_path), losses=losses, use_cpu=True, report_to="none")
    with pytest.raises(InputError) as error:
        DistillationTrainer(model=model, args=args)
    assert str(error.value).startswith(message) and len(str(error.value)) <= 300


def test_what_exits_do_not_go_with_is_one_line():
    losses = parse_objective({"labels": {}, "exits": {}})
    for use in (Use(kind="token"), Use(kind="example", single_output=True), Use(reentrant="some.field")):
        assert any(fault.field.startswith("losses.exits") for fault in losses.faults(use)), use
    with pytest.raises(InputError, match=r"^losses.exits: got .*at least one of them above 0"):
        parse_objective({"exits": {"labels": 0, "logits": 0, "hints": 0}})
