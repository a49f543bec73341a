"""A student that learns from the moving average of its own weights."""

import copy

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, causal_model, pruned_student, rows, trainer_of, with_lora
from torch.nn import functional as F

from distill_llm.common.errors import InputError
from distill_llm.models.adapters import merged
from distill_llm.teachers import MovingAverage
from distill_llm.training import trainer as trainers

RATE = 0.5
SGD = {"optim": "sgd", "learning_rate": RATE, "lr_scheduler_type": "constant"}
pytestmark = pytest.mark.slow


def stacked(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("warm_up, decays", [(True, (1 / 2, 2 / 3, 0.7)), (False, (0.7, 0.7, 0.7))])
@pytest.mark.parametrize("as_student", [False, True])
def test_three_steps_are_those_of_a_loop_by_hand(tmp_path, warm_up, decays, as_student):
    student = tiny_model(layers=2, **NO_DROPOUT)
    data = rows(student)
    own, average, batch = copy.deepcopy(student).train(), copy.deepcopy(student), stacked(data)
    labels, apart = batch.pop("labels"), []
    for decay in decays:
        with torch.no_grad():
            target = average(**batch).logits.softmax(-1)
        logits = own(**batch).logits
        apart.append(F.kl_div(logits.log_softmax(-1), target, reduction="batchmean"))
        (0.5 * F.cross_entropy(logits, labels) + 0.5 * apart[-1]).backward()
        with torch.no_grad():
            for weight, followed in zip(own.parameters(), average.parameters(), strict=True):
                if weight.grad is not None:
                    weight -= RATE * weight.grad
                    weight.grad = None
                followed.copy_(decay * followed + (1 - decay) * weight)

    losses = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}
    trainer = trainer_of(tmp_path, student, MovingAverage(0.7, warm_up), data, losses, max_steps=3, **SGD)
    trainer.train()
    if as_student:
        trainer.teacher.hand_over()
    for found, expected in ((student, average if as_student else own), (trainer.teacher.model, average)):
        for (name, weight), other in zip(found.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)
    logged = [log["loss/logits"] for log in trainer.state.log_history if "loss/logits" in log]
    assert logged == pytest.approx([value.item() for value in apart], rel=1e-3, abs=1e-7) and logged[2] > 1e-4


def test_with_warm_up_the_average_is_the_mean_of_all_weights_until_the_decay_holds():
    student = tiny_model(layers=1)
    teacher = MovingAverage(0.9)
    teacher.meet(student)
    teacher.place(torch.device("cpu"))
    weight, seen = student.classifier.weight, []
    for step in range(9):
        seen.append(weight.detach().clone())
        with torch.no_grad():
            weight.normal_(generator=torch.Generator().manual_seed(step))
        teacher.after_step(step + 1)
        expected = torch.stack([*seen, weight.detach()]).mean(0)
        torch.testing.assert_close(teacher.model.classifier.weight, expected)
    assert [teacher.decay_at(step) for step in (1, 9, 10, 1000)] == [0.5, 0.9, 0.9, 0.9]


@pytest.mark.parametrize("weights", ["mixed", "bfloat16"])
def test_in_mixed_precision_it_computes_as_the_student_does_and_keeps_changes_that_fewer_bits_would_lose(
    tmp_path, weights
):
    student = causal_model(layers=2)
    student = student.bfloat16() if weights == "bfloat16" else student
    data, average = rows(student), copy.deepcopy(student).float()
    teacher = MovingAverage(0.999, warm_up=False)
    trainer = trainer_of(
        tmp_path, student, teacher, data, {"labels": {}, "logits": {}}, bf16=weights == "mixed", max_steps=1, **SGD
    )
    batch = stacked(data)
    labels = batch.pop("labels")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = average(**batch).logits
    found = teacher.signals(batch, 0, torch.arange(labels.numel()))
    assert found.logits.dtype == torch.bfloat16 and torch.equal(found.logits, expected.flatten(0, 1))
    trainer.train()
    assert {each.dtype for each in teacher.model.parameters()} == {torch.float32}
    for (name, old), new, kept in zip(
        average.named_parameters(), student.parameters(), teacher.model.parameters(), strict=True
    ):
        torch.testing.assert_close(kept, 0.999 * old + 0.001 * new.float(), rtol=1e-6, atol=1e-9, msg=name)
    moved = [
        not torch.equal(kept, old) for kept, old in zip(teacher.model.parameters(), average.parameters(), strict=True)
    ]
    assert all(moved)


def test_under_lora_only_adapters_are_averaged_and_the_rest_is_held_once(tmp_path):
    student = with_lora(causal_model(layers=2))
    before = {name: each.detach().clone() for name, each in student.named_parameters()}
    teacher = MovingAverage(0.5, warm_up=False)
    trainer = trainer_of(
        tmp_path, student, teacher, rows(student.get_base_model()), {"labels": {}, "logits": {}}, **SGD
    )
    trainer.train()
    own = student.get_base_model()
    held = dict(teacher.model.named_parameters())
    for name, weight in own.named_parameters():
        started = before[f"base_model.model.{name}"]
        if weight.requires_grad:
            torch.testing.assert_close(held[name], (started + weight) / 2)
            assert not torch.equal(weight, started)
        else:
            assert held[name].data_ptr() == weight.data_ptr()
    assert sum(map(torch.numel, teacher.state_dict()["weights"])) == sum(
        p.numel() for p in own.parameters() if p.requires_grad
    )
    batch = stacked(rows(own))
    teacher.hand_over()
    with torch.no_grad():
        expected = teacher.model(input_ids=batch["input_ids"]).logits
        torch.testing.assert_close(merged(student)(input_ids=batch["input_ids"]).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lora", [False, True])
def test_it_is_resumed_bit_for_bit(tmp_path, lora):
    student = causal_model(layers=2, attention_dropout=0.1)
    student = with_lora(student) if lora else student
    data = rows(causal_model(layers=1), count=16)
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": True}

    def trained(resume=None):
        own, teacher = copy.deepcopy(student), MovingAverage(0.9)
        trainer_of(tmp_path, own, teacher, data, {"labels": {}, "logits": {}}, **settings).train(
            resume_from_checkpoint=resume
        )
        return [*own.state_dict().values(), *teacher.model.state_dict().values()]

    whole = trained()
    checkpoint = tmp_path / "checkpoint-2"
    assert same(whole, trained(str(checkpoint)))
    kept = torch.load(checkpoint / "teacher.pt")
    torch.save({**kept, "weights": [each + 1e-3 for each in kept["weights"]]}, checkpoint / "teacher.pt")
    assert not same(whole, trained(str(checkpoint)))


@pytest.mark.parametrize("name", ["hidden", "attention", "neurons", "gradients"])
def test_layers_of_a_pruned_student_are_compared_with_the_same_layers_of_its_average(tmp_path, name):
    student = pruned_student(tiny_model(layers=4, **NO_DROPOUT))
    losses, settings = {"labels": {}, name: {}}, {**SGD, "learning_rate": 0.01, "max_steps": 3}
    trainer = trainer_of(tmp_path, student, MovingAverage(0.9), rows(student), losses, **settings)
    trainer.train()
    assert all(pair.student == pair.teacher for pair in trainer.terms.pairs[name])
    logged = [log[f"loss/{name}"] for log in trainer.state.log_history if f"loss/{name}" in log]
    assert name == "neurons" or logged[0] == pytest.approx(0, abs=1e-6)  # the margin of `neurons` is never reached
    assert logged[0] != logged[2]


def test_what_it_cannot_do_is_refused_in_one_line(tmp_path, monkeypatch):
    for decay in (1, -0.1, 2.0):
        with pytest.raises(InputError, match="^decay: got .*accepted: a number from 0 and below 1"):
            MovingAverage(decay)
    student = tiny_model(layers=1)
    monkeypatch.setattr(trainers, "sharding_of", lambda trainer: "FSDP2")
    with pytest.raises(InputError, match="^teacher: got 'FSDP2'; use DDP: this teacher reads the student's weights"):
        trainer_of(tmp_path, student, MovingAverage(), rows(student), {"logits": {}})
    trainer_of(tmp_path, student, tiny_model(layers=1, seed=1), rows(student), {"logits": {}})
