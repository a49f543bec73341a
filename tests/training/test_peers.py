"""Students that learn together: every one's steps as a loop by hand takes them, and a stop that changes no bit."""

import copy
from itertools import pairwise

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, causal_model, rows, trainer_of, with_lora
from torch import nn
from torch.nn import functional as F

from distill_llm.common.errors import InputError
from distill_llm.teachers import Peers
from distill_llm.training import trainer as trainers

pytestmark = pytest.mark.slow
LOSSES = {"labels": {"weight": 0.4}, "logits": {"weight": 0.6}}
RATE, DECAY, LONGEST, EPSILON = 0.02, 0.1, 0.3, 1e-3


def stacked(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def group_of(count):
    """Models of unlike sizes with the same classes."""
    sizes = [{"layers": 2, "hidden": 16}, {"layers": 1, "hidden": 32}, {"layers": 3, "hidden": 24}]
    return [tiny_model(seed=seed, **NO_DROPOUT, **size) for seed, size in enumerate(sizes[:count])]


def optimizer_of(model):
    """AdamW as transformers makes it: no decay of biases and LayerNorms."""
    plain = [each for name, each in model.named_parameters() if "bias" in name or "LayerNorm" in name]
    others = [each for name, each in model.named_parameters() if not ("bias" in name or "LayerNorm" in name)]
    groups = [{"params": others, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=RATE, eps=EPSILON)


def by_hand(models, batch, labels, steps, average):
    """Train models together; the weighted loss of each in each step."""
    optimizers, losses = [optimizer_of(model.train()) for model in models], []
    for step in range(steps):
        logits = [model(**batch).logits for model in models]
        losses.append([])
        for number, own in enumerate(logits):
            others = [each.detach() for place, each in enumerate(logits) if place != number]
            target = sum(each.softmax(-1) for each in others) / len(others)
            if average == "logits":
                target = (sum(others) / len(others)).softmax(-1)
            apart = F.kl_div(own.log_softmax(-1), target, reduction="batchmean")
            losses[-1].append(0.4 * F.cross_entropy(own, labels) + 0.6 * apart)
        sum(losses[-1]).backward()
        for model, optimizer in zip(models, optimizers, strict=True):
            nn.utils.clip_grad_norm_(model.parameters(), LONGEST)
            for group in optimizer.param_groups:
                group["lr"] = RATE * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("count, average", [(2, "probabilities"), (3, "probabilities"), (3, "logits")])
def test_three_steps_are_those_of_a_loop_by_hand(tmp_path, count, average):
    models = group_of(count)
    data = rows(models[0])
    own, batch = copy.deepcopy(models), stacked(data)
    labels = batch.pop("labels")
    expected = by_hand(own, batch, labels, 3, average)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}
    settings |= {"max_grad_norm": LONGEST, "weight_decay": DECAY, "adam_epsilon": EPSILON, "learning_rate": RATE}
    trainer = trainer_of(tmp_path, models[0], Peers(models[1:], average), data, LOSSES, max_steps=3, **settings)
    before = copy.deepcopy(models)
    trainer.train()
    for found, hand, start in zip(models, own, before, strict=True):
        for (name, weight), other, old in zip(
            found.named_parameters(), hand.parameters(), start.parameters(), strict=True
        ):
            torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5, msg=name)
            assert "pooler" in name or "key.bias" in name or "position" in name or not torch.equal(weight, old)
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for log, losses in zip(logs, expected, strict=True):
        assert log["loss"] == pytest.approx(sum(losses).item(), rel=1e-3)
        for number, loss in enumerate(losses[1:], 1):
            assert log[f"loss/peer_{number}"] == pytest.approx(loss.item(), rel=1e-3)


def test_the_mean_of_probabilities_has_the_gradient_of_the_mean_divergence_to_each():
    torch.manual_seed(0)
    own, *others = (torch.randn(5, 4, dtype=torch.double) for _ in range(4))
    own.requires_grad_(True)

    def gradient(loss):
        return torch.autograd.grad(loss, own)[0]

    def apart(target):
        return F.kl_div(own.log_softmax(-1), target, reduction="sum")

    each = gradient(sum(apart(logits.softmax(-1)) for logits in others) / 3)
    target = Peers([tiny_model(layers=1)])._mean(others).softmax(-1).double()
    torch.testing.assert_close(gradient(apart(target)), each, rtol=1e-5, atol=1e-6)


def test_language_models_learn_from_each_other_at_the_tokens_with_labels(tmp_path):
    models = [causal_model(layers=2), causal_model(layers=1, seed=1)]
    data = rows(models[0])
    own, batch = copy.deepcopy(models), stacked(data)
    labels = batch.pop("labels")
    with torch.no_grad():
        logits = [model(**batch).logits[:, :-1][labels[:, 1:] != -100] for model in own]
    wanted = labels[:, 1:][labels[:, 1:] != -100]
    expected = []
    for mine, theirs in (logits, logits[::-1]):
        apart = F.kl_div(mine.log_softmax(-1), theirs.softmax(-1), reduction="batchmean")
        expected.append((0.4 * F.cross_entropy(mine, wanted) + 0.6 * apart).item())
    trainer = trainer_of(tmp_path, models[0], Peers(models[1:]), data, LOSSES, max_steps=1)
    trainer.train()
    log = trainer.state.log_history[0]
    assert log["loss"] == pytest.approx(sum(expected), rel=1e-4)
    assert log["loss/peer_1"] == pytest.approx(expected[1], rel=1e-4)


def test_in_mixed_precision_peers_compute_as_the_student_does(tmp_path):
    models = [causal_model(layers=2), causal_model(layers=1, seed=1)]
    data = rows(models[0])
    batch = stacked(data)
    del batch["labels"]
    peers = Peers(models[1:])
    trainer_of(tmp_path, models[0], peers, data, LOSSES, bf16=True)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = models[1].train()(**batch).logits
    found = peers.signals(batch, 0, torch.arange(batch["input_ids"].numel()))
    assert torch.equal(found.logits, expected.flatten(0, 1).float()) and not found.logits.requires_grad
    assert {each.dtype for each in models[1].parameters()} == {torch.float32}


def test_a_stop_changes_no_bit_of_any_student(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": True, "lr_scheduler_type": "linear"}
    start = [tiny_model(layers=2), tiny_model(layers=1, hidden=32, seed=1), tiny_model(layers=3, seed=2)]
    data = rows(start[0], count=24)

    def trained(resume=None):
        models = copy.deepcopy(start)
        trainer = trainer_of(tmp_path, models[0], Peers(models[1:]), data, LOSSES, **settings)
        trainer.train(resume_from_checkpoint=resume)
        return [tensor for model in models for tensor in model.state_dict().values()]

    def same(left, right):
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

    whole, checkpoint = trained(), tmp_path / "checkpoint-2"
    assert same(whole, trained(str(checkpoint)))
    file = checkpoint / "peer_2.pt"
    kept = torch.load(file)
    for part, spoilt in (
        ("weights", {name: each + 1e-3 for name, each in kept["weights"].items()}),
        ("states", [None if state is None else {**state, "exp_avg": state["exp_avg"] * 2} for state in kept["states"]]),
        ("groups", [{**group, "weight_decay": 0.5} for group in kept["groups"]]),
    ):
        torch.save({**kept, part: spoilt}, file)
        assert not same(whole, trained(str(checkpoint))), part


def test_peers_with_activations_computed_again_learn_the_same(tmp_path):
    found = []
    for again in (False, True):
        models = [causal_model(layers=2), causal_model(layers=3, seed=1)]
        data = rows(models[0])
        settings = {"max_steps": 2, "activation_checkpointing": again}
        trainer_of(tmp_path, models[0], Peers(models[1:]), data, LOSSES, **settings).train()
        assert models[1].is_activation_checkpointing == again
        found.append([each for model in models for each in model.parameters()])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_in_one_peer_is_skipped_by_all(tmp_path):
    models, seen = group_of(3), []
    data = rows(models[0])

    def spoil(module, args, output):
        if module.training:
            seen.append([each.detach().clone() for model in models for each in model.parameters()])
            if len(seen) == 2:
                output.logits = output.logits * float("nan")

    models[2].register_forward_hook(spoil)
    trainer = trainer_of(
        tmp_path, models[0], Peers(models[1:]), data, LOSSES, max_steps=4, on_nonfinite="skip", max_grad_norm=1.0
    )
    trainer.train()
    moved = [any(not torch.equal(a, b) for a, b in zip(one, two, strict=True)) for one, two in pairwise(seen)]
    assert moved == [True, False, True]
    assert sum(log.get("skipped_steps", 0) for log in trainer.state.log_history[:-1]) == 1


def test_what_peers_cannot_do_is_refused_in_one_line(tmp_path, monkeypatch):
    one, two, three = group_of(3)
    data = rows(one)

    def refused(words, models, losses=LOSSES, student=one, **settings):
        with pytest.raises(InputError, match="^" + words) as error:
            trainer_of(tmp_path, student, Peers(models), data, losses, **settings)
        assert "\n" not in str(error.value)

    refused("models: got 'no models'", [])
    refused("models.1: got 'a model with adapters'; accepted: a plain model", [two, with_lora(copy.deepcopy(three))])
    refused("losses.hidden: .*peers of the student", [two], {"labels": {}, "hidden": {"layers": "uniform"}})
    refused("models.0: got '3 labels'", [tiny_model(num_labels=3)])
    refused("models.1: got 'the student itself'", [two, one])
    refused("models.0: ", [two, two])
    scheduler = torch.optim.SGD(one.parameters(), lr=0.1)
    given = (scheduler, torch.optim.lr_scheduler.ConstantLR(scheduler))
    refused(
        "optimizers: got 'ConstantLR'; accepted: an optimizer without a scheduler: peers join", [two], optimizers=given
    )
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "save_steps": 1}
    refused("load_best_model_at_end: got True; set it to false: only the student's weights", [two], **best)
    with pytest.raises(InputError, match="^average: "):
        Peers([two], "median")
    monkeypatch.setattr(trainers, "sharding_of", lambda trainer: "DeepSpeed")
    refused("teacher: got 'DeepSpeed'; use DDP", [two])
