"""Zeros of a sparse student stay through training, and training is the same as that of the weights that are left."""

import copy

import pytest
import torch
from builders.models import tiny_model
from builders.pairs import one_and_two_processes
from builders.trainers import NO_DROPOUT, rows, trainer_of, with_lora

from distill_llm import KeepZeros, SparsityRules, sparsify
from distill_llm.common.errors import InputError
from distill_llm.models.masks import linears_of

pytestmark = pytest.mark.slow

LOSSES = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}


@pytest.fixture(scope="module")
def sparse():
    return sparsify(tiny_model(**NO_DROPOUT), rules=SparsityRules(0.5, criterion="magnitude"))


def trained(folder, sparse, resume=None, callback=True, **settings):
    student, masks = copy.deepcopy(sparse[0]), sparse[1]
    teacher = tiny_model(seed=1, **NO_DROPOUT)
    given = {"callbacks": [KeepZeros(masks)]} if callback else {}
    trainer = trainer_of(
        folder, student, teacher, rows(teacher, count=24), LOSSES, **{"max_steps": 6, **settings}, **given
    )
    trainer.train(resume_from_checkpoint=resume)
    return student


def assert_zeros(student, masks):
    for name, mask in masks.kept.items():
        weight = linears_of(student)[name].weight
        assert not weight[~mask].any() and (weight[mask] != 0).all(), name


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
def test_zeros_stay_under_weight_decay_and_clipping_whatever_the_optimizer(tmp_path, sparse, optim):
    student = trained(tmp_path, sparse, optim=optim, weight_decay=0.1, max_grad_norm=0.5)
    assert_zeros(student, sparse[1])
    for name, module in linears_of(student).items():
        assert (module.weight != linears_of(sparse[0])[name].weight).any(), name


def test_zeros_stay_under_an_optimizer_that_steps_where_the_gradient_is_zero(sparse):
    student, keep = copy.deepcopy(sparse[0]), KeepZeros(sparse[1])
    keep.on_train_begin(None, None, None, model=student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 1.0
    keep.on_optimizer_step(None, None, None)
    for name, mask in sparse[1].kept.items():
        weight, before = linears_of(student)[name].weight, linears_of(sparse[0])[name].weight
        assert torch.equal(weight, (before + 1) * mask), name


def test_without_it_zeros_are_filled(tmp_path, sparse):
    student = trained(tmp_path, sparse, callback=False)
    name, mask = next(iter(sparse[1].kept.items()))
    assert linears_of(student)[name].weight[~mask].any()


def test_removed_weights_count_neither_for_the_norm_nor_for_moments(tmp_path, sparse):
    """As plain SGD by hand: clipped by the norm of the gradients that are left."""
    student, masks = copy.deepcopy(sparse[0]), sparse[1]
    found = trained(tmp_path, sparse, optim="sgd", max_steps=1, max_grad_norm=0.1, per_device_train_batch_size=24)
    teacher = tiny_model(seed=1, **NO_DROPOUT)
    batch = {name: torch.stack([row[name] for row in rows(teacher, count=24)]) for name in rows(teacher, count=1)[0]}
    student.train()
    out, wanted = student(**batch), teacher(**batch).logits.detach()
    kl = torch.nn.functional.kl_div(out.logits.log_softmax(-1), wanted.softmax(-1), reduction="batchmean")
    (0.5 * out.loss + 0.5 * kl).backward()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters()}
    for name, mask in masks.kept.items():
        gradients[f"{name}.weight"][~mask] = 0
    norm = torch.stack([each.norm() for each in gradients.values()]).norm()
    before = dict(sparse[0].named_parameters())
    for name, tensor in found.named_parameters():
        expected = before[name] - 1e-2 * gradients[name] * 0.1 / (norm + 1e-6)
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_training_goes_on_from_a_checkpoint_with_equal_bits(tmp_path, sparse):
    settings = {"save_strategy": "steps", "save_steps": 3, "weight_decay": 0.1, "max_grad_norm": 1.0}
    whole = trained(tmp_path / "whole", sparse, **settings)
    resumed = trained(tmp_path / "resumed", sparse, resume=str(tmp_path / "whole" / "checkpoint-3"), **settings)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert_zeros(resumed, sparse[1])


def test_masks_of_another_model_and_adapters_are_refused(tmp_path, sparse):
    with pytest.raises(InputError, match="masks of this model"):
        trained(tmp_path, (tiny_model(layers=1, seed=3), sparse[1]))
    teacher = tiny_model(seed=1)
    trainer = trainer_of(
        tmp_path, with_lora(copy.deepcopy(sparse[0])), teacher, rows(teacher), LOSSES, callbacks=[KeepZeros(sparse[1])]
    )
    with pytest.raises(InputError, match="without adapters"):
        trainer.train()


def test_two_processes_train_as_one_and_keep_the_same_zeros(tmp_path):
    runs = one_and_two_processes(tmp_path, [("sparse", 0, ["0.5"])])
    one, first, second = (run["sparse 0.5"][0] for run in runs)
    zeros = 0
    for name, tensor in one.items():
        torch.testing.assert_close(first[name], tensor, rtol=2e-4, atol=2e-5, msg=name)
        assert torch.equal(first[name], second[name]) and torch.equal(first[name] == 0, tensor == 0), name
        zeros += int((tensor == 0).sum())
    assert zeros >= (4 * 32 * 32 + 2 * 32 * 64) / 2  # of the linears of one layer
