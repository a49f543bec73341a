"""What a cache says of a batch is looked up where the batch is made, and travels with it."""

import pickle

import pytest
import torch
from builders.trainers import assert_same_step, cached, model_of, rows, step_gradient, trainer_of

from distill_llm.teachers import CachedTeacher

BOTH = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}
HEADS = ["sequence-classification", "masked-lm", "causal-lm"]


@pytest.mark.parametrize("head", HEADS)
def test_nothing_is_looked_up_while_a_loss_is_made(tmp_path, monkeypatch, head):
    teacher, data = model_of(head, layers=2), rows(model_of(head, layers=2), count=16)
    trainer = trainer_of(
        tmp_path, model_of(head, layers=1, seed=1), cached(tmp_path / "cache", teacher, data, k=20), data, BOTH,
        max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    )  # fmt: skip
    loss, look_up, found = trainer.loss, CachedTeacher.prefetch, []

    def inside(*args):
        with monkeypatch.context() as patch:
            patch.setattr(CachedTeacher, "prefetch", lambda *_: pytest.fail("looked up"))
            return loss(*args)

    def noting(*args):
        found.append(look_up(*args))
        return found[-1]

    monkeypatch.setattr(CachedTeacher, "prefetch", noting)
    trainer.loss = inside
    trainer.train()
    assert len(found) >= 4


@pytest.mark.parametrize("head", HEADS)
def test_workers_of_the_data_loader_look_up_what_the_process_itself_does(tmp_path, head):
    teacher, student = model_of(head, layers=2), model_of(head, layers=1, seed=1)
    data = rows(teacher)
    source = cached(tmp_path / "cache", teacher, data, k=20)
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    whole = step_gradient(tmp_path, student, source, data, BOTH)
    for settings in (split, {"dataloader_num_workers": 2, **split}):
        assert_same_step([step_gradient(tmp_path, student, source, data, BOTH, **settings), whole])


def test_a_cache_goes_to_another_process_as_its_path(tmp_path):
    teacher = model_of("causal-lm", layers=1)
    data = rows(teacher, count=32)
    source = cached(tmp_path / "cache", teacher, data, k=20)
    sent = pickle.dumps(source)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    positions = (batch["labels"][:, 1:] != -100).flatten().nonzero().squeeze(-1)
    positions += positions // (batch["labels"].shape[1] - 1)
    assert len(sent) < 1000
    here, there = (each.signals(batch, positions=positions) for each in (source, pickle.loads(sent)))
    assert all(map(torch.equal, here.targets, there.targets))
