"""Terms are left out in steps in which their weight is 0."""

import pytest
import torch
from builders.trainers import TERMS, model_of, rows, trainer_of

from distill_llm.losses.terms.hidden import HiddenLoss

SGD = {"optim": "sgd", "learning_rate": 0.05}


def trained(folder, monkeypatch, head, losses, everything):
    """Weights, logs, and by step what ran: the teacher, `hidden`, the layers recorded of the teacher."""
    teacher, student = model_of(head, layers=4), model_of(head, layers=2, hidden=24, seed=1)
    trainer = trainer_of(folder, student, teacher, rows(teacher, count=16), losses, max_steps=8, **SGD)
    ran = {step: set() for step in range(8)}
    signals, total = trainer.teacher.signals, HiddenLoss.sum

    def asked(*args, **kwargs):
        ran[trainer.state.global_step] |= {"teacher", *trainer.teacher.recorder.wanted.hidden}
        return signals(*args, **kwargs)

    def summed(*args):
        ran[trainer.state.global_step].add("hidden")
        return total(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.teacher, "signals", asked)
        patch.setattr(HiddenLoss, "sum", summed)
        if everything:
            patch.setattr(trainer, "_counted", lambda answered: list(losses))
        trainer.train()
    return student.state_dict(), [log for log in trainer.state.log_history if "loss" in log], ran


@pytest.mark.parametrize(
    "head",
    ["sequence-classification", *(pytest.param(each, marks=pytest.mark.slow) for each in ("masked-lm", "causal-lm"))],
)
def test_what_has_no_weight_is_not_computed_and_the_rest_stays_as_it_was(tmp_path, monkeypatch, head):
    """Of 8 steps: hidden in 0 to 3, labels from 4, logits from 6."""
    (weights, logs, ran), (all_weights, all_logs, all_ran) = (
        trained(tmp_path, monkeypatch, head, TERMS["stages"], everything) for everything in (False, True)
    )
    layers = {1, 3}
    first, second, third = {"teacher", "hidden", *layers}, set(), {"teacher"}
    assert list(ran.values()) == [first] * 4 + [second] * 2 + [third] * 2
    assert list(all_ran.values()) == [first] * 8
    for step, (log, wanted) in enumerate(zip(logs, all_logs, strict=True)):
        names = ["hidden"] if step < 4 else ["labels"] if step < 6 else ["labels", "logits"]
        assert [name for name in TERMS["stages"] if f"loss/{name}" in log] == sorted(names)
        for name in ("loss", "grad_norm", *(f"loss/{each}" for each in names)):
            assert log[name] == pytest.approx(wanted[name], rel=1e-5), (step, name)
    for name, each in weights.items():
        torch.testing.assert_close(all_weights[name], each, rtol=1e-5, atol=1e-6, msg=name)


def test_a_step_in_which_nothing_counts_changes_nothing(tmp_path):
    teacher, student = (
        model_of("sequence-classification", layers=2),
        model_of("sequence-classification", layers=1, seed=1),
    )
    before = {name: each.clone() for name, each in student.state_dict().items()}
    weight = {"start": 0, "end": 1, "schedule": "constant", "steps": 2}
    losses = {"labels": {"weight": weight}, "logits": {"weight": weight}}
    trainer_of(tmp_path / "two", student, teacher, rows(teacher), losses, max_steps=2, **SGD).train()
    assert all(torch.equal(each, before[name]) for name, each in student.state_dict().items())
    trainer_of(tmp_path / "three", student, teacher, rows(teacher), losses, max_steps=3, **SGD).train()
    assert not torch.equal(before["classifier.weight"], student.state_dict()["classifier.weight"])
