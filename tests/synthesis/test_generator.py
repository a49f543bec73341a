"""The generator's losses by hand, its numbers by place, and training in one process as in two."""

import pytest
import torch
from builders.generating import adversary_of, teacher_and_student, trained
from builders.processes import run_script

from distill_llm.common.errors import InputError


def outputs(model, space, inputs):
    return model(**{"inputs_embeds": inputs, "attention_mask": space.batch(inputs)["attention_mask"]}).logits.detach()


@pytest.mark.slow
def test_the_parts_of_the_loss_are_those_of_the_papers():
    teacher, student = teacher_and_student()
    adversary = adversary_of(teacher, rows=5)
    inputs = adversary.inputs(5, 3, first=2**32).detach()
    target, own = (outputs(model, adversary.space, inputs) for model in (teacher, student))
    parts = adversary.learn(teacher, student, 3)
    shares = target.softmax(-1)
    mean = shares.mean(0)
    assert parts["balance"] == pytest.approx((mean * mean.log()).sum().item(), rel=1e-5)
    assert parts["confidence"] == pytest.approx(-shares.max(-1).values.log().mean().item(), rel=1e-5)
    assert parts["disagreement"] == pytest.approx(-(target - own).abs().mean().item(), rel=1e-5)
    assert "disagreement" not in adversary.learn(teacher, None, 4)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["disagreement", "balance", "confidence"])
def test_a_generator_that_learns_one_part_makes_it_smaller_and_no_model_changes(part):
    teacher, student = teacher_and_student()
    student.train()
    before = [{name: each.clone() for name, each in model.state_dict().items()} for model in (teacher, student)]
    weights = {"disagreement": 0.0, "balance": 0.0, "confidence": 0.0, part: 1.0}
    adversary = adversary_of(teacher, rows=32, learning_rate=1e-2, **weights)
    found = [adversary.learn(teacher, student, step)[part] for step in range(30)]
    assert sum(found[-3:]) < sum(found[:3]) - 0.02
    assert student.training and all(each.grad is None for model in (teacher, student) for each in model.parameters())
    for model, kept in zip((teacher, student), before, strict=True):
        assert all(torch.equal(each, kept[name]) for name, each in model.state_dict().items())


def test_the_rows_of_a_batch_may_be_divided_and_differ_by_row_step_and_seed():
    teacher, _ = teacher_and_student()
    adversary = adversary_of(teacher)
    whole = adversary.fill({}, 6, 2)["inputs_embeds"]
    parts = [adversary.fill({}, 2, 2, first)["inputs_embeds"] for first in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.allclose(whole[0], whole[1])
    assert not torch.allclose(adversary.fill({}, 6, 3)["inputs_embeds"], whole)
    state = torch.get_rng_state()
    other = adversary_of(teacher, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.allclose(other.fill({}, 6, 2)["inputs_embeds"], whole)


@pytest.mark.slow
def test_two_processes_train_as_one_and_a_resumed_training_goes_on_with_the_same_bits(tmp_path):
    whole, generator, _ = trained(tmp_path / "one")
    run_script("generate_in_processes.py", tmp_path, processes=2, ACCELERATE_USE_CPU="true")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for name, tensor in whole.items():
        torch.testing.assert_close(first[0][name], tensor, rtol=2e-4, atol=2e-5, msg=name)
        assert torch.equal(first[0][name], second[0][name])
    for name, tensor in generator.items():
        torch.testing.assert_close(first[1][name], tensor, rtol=2e-3, atol=2e-4, msg=name)
        assert torch.equal(first[1][name], second[1][name])
    resumed, again, _ = trained(tmp_path / "again", resume=tmp_path / "one" / "checkpoint-3")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert all(torch.equal(again[name], tensor) for name, tensor in generator.items())


@pytest.mark.slow
def test_accumulated_micro_batches_train_as_one_batch(tmp_path):
    whole = trained(tmp_path / "whole")[0]
    parts = trained(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)[0]
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=2e-4, atol=2e-5, msg=name)


@pytest.mark.slow
def test_rows_that_are_made_are_negatives_of_each_other(tmp_path):
    log = trained(tmp_path, losses={"qud": {"queue": 16}})[2]
    found = [row["loss/qud"] for row in log if "loss/qud" in row]
    assert len(found) == 6 and found[0] == 0 and all(value > 0.5 for value in found[1:])


@pytest.mark.slow
@pytest.mark.parametrize(
    "term, line",
    [
        ({"labels": {}}, r"^losses.labels: got 'rows of a generator'; remove it"),
        ({"smoothing": {}}, r"^losses.smoothing: got 'rows of a generator'; remove it"),
        ({"gradients": {}}, r"^losses.gradients.of: got 'loss'; set another one"),
        ({"contrast": {"negatives": "other_classes"}}, r"^losses.contrast.negatives: got 'other_classes'; set another"),
    ],
)
def test_what_needs_labels_is_refused(term, line, tmp_path):
    with pytest.raises(InputError, match=line):
        trained(tmp_path, losses={**term, "logits": {}})
