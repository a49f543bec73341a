"""Queues and class centres against loops over lists, step after step."""

import math

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, TERMS, rows, trainer_of

from distill_llm.common.errors import InputError
from distill_llm.losses.matching import Match, MatchSettings
from distill_llm.losses.memory import UNKNOWN, text_keys
from distill_llm.losses.objective import parse_objective
from distill_llm.losses.signals import Batch, Signals
from distill_llm.losses.terms.term import Use

CLASSES, TEXTS = 4, 9


def steps(count=5, seed=0, size=6):
    """By step the states of both models (4 wide), the texts and the classes of the rows; texts come again, class 3 is rare."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(count):
        states = [torch.randn(size, 1, 4, generator=generator) + 0.5 for _ in range(2)]
        texts = torch.randint(1, TEXTS, (size, 1), generator=generator)
        yield *states, texts, torch.tensor([-100 if text == 8 else text % (3 if step < 2 else 4) for text in texts])


def values_of(name, **settings):
    """The sum of each step and its gradient in the student's states, with the memory going on between them."""
    models = [tiny_model(layers=1, hidden=4, heads=1, num_labels=CLASSES, seed=seed) for seed in (0, 1)]
    (term,) = parse_objective({name: settings}).terms().values()
    match = Match(*models, MatchSettings())
    pairs = term.layer_pairs(match)
    match.memories[name] = term.memory(match, pairs)
    found = []
    for student, teacher, texts, labels in steps():
        student.requires_grad_()
        signals = [Signals({0: each}, logits=torch.zeros(6, 2)) for each in (teacher, student)]
        batch = Batch(signals[0], labels, torch.ones(6, 1), student=signals[1], tokens=texts)
        value = term.sum(batch, match, pairs)
        found.append((value.detach(), *torch.autograd.grad(value, student)))
        match.memories[name].end_step()
    return found


def unit(x):
    return x / x.norm()


def queue_by_loops(name, size, other_classes, temperature=0.5):
    queue, level, found = [], None, []
    for student, teacher, texts, labels in steps():
        student = student.double().requires_grad_()
        s, t = ([unit(row[0]) for row in each] for each in (student, teacher.double()))
        total = 0.0 * student.sum()
        for i in range(len(s)):
            others = [
                torch.exp(s[i] @ vector / temperature)
                for vector, text, label in queue
                if text != int(texts[i]) and not (other_classes and label == labels[i] and label >= 0)
            ]
            own = torch.exp(s[i] @ t[i] / temperature)
            if name == "qud":
                total = total - torch.log(own / (own + sum(others)))
            elif others and level is not None:
                chance = len(others) * level
                total = total - torch.log(own / (own + chance))
                total = total - sum(torch.log(chance / (other + chance)) for other in others)
        found.append((total.detach(), *torch.autograd.grad(total, student)))
        queue = [*queue, *zip(t, texts.flatten().tolist(), labels.tolist(), strict=True)][-size:]
        if level is None:
            with torch.no_grad():
                scores = [
                    math.exp(s[i] @ vector / temperature)
                    for i in range(len(s))
                    for vector, text, _ in queue
                    if text != int(texts[i])
                ]
            level = sum(scores) / len(scores) if scores else None
    return found


def assert_alike(found, expected):
    for (value, slope), (wanted, slope_wanted) in zip(found, expected, strict=True):
        assert float(value) == pytest.approx(float(wanted), rel=1e-5, abs=1e-6)
        torch.testing.assert_close(slope, slope_wanted.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [4, 10, 100])
@pytest.mark.parametrize("name, other_classes", [("qud", False), ("contrast", False), ("contrast", True)])
def test_a_queue_of_embeddings_gives_what_a_list_of_the_latest_does(name, other_classes, size):
    """Of 6 rows a step: a queue of fewer, one that ends within a step, and one that is never full."""
    own = {"negatives": "other_classes"} if other_classes else {}
    found = values_of(name, queue=size, temperature=0.5, **own)
    assert_alike(found, queue_by_loops(name, size, other_classes))
    assert found[0][0] == 0 and found[1][0] > 0


def test_without_a_level_the_value_is_zero():
    (term,) = parse_objective({"contrast": {}}).terms().values()
    given = torch.ones(1, 1), torch.ones(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)
    assert term.of_examples(*given, torch.tensor([math.nan])).item() == 0
    by_hand = math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))  # N = Z = 1
    assert term.of_examples(*given, torch.zeros(1)).item() == pytest.approx(by_hand)


def centres_by_loops(form, hard, scale=8.0, margin=0.4):
    centres, found = {}, []
    for student, teacher, _, labels in steps():
        student = student.double().requires_grad_()
        s, t = ([unit(row[0]) for row in each] for each in (student, teacher.double()))
        total, begun = 0.0 * student.sum(), dict(centres)
        for i, label in enumerate(labels.tolist()):
            if label < 0:
                continue
            alpha = min(max(float(s[i] @ t[i]), 0.0), 1.0)
            if hard:
                alpha *= max(float(unit(begun[label]) @ t[i]), 0.0) if label in begun else 0.0
            target = t[i] if label not in begun else alpha * begun[label] + (1 - alpha) * t[i]
            near = s[i] @ unit(target)
            if form == "cosine":
                near = near - margin
            elif torch.acos(near) + margin < math.pi:
                near = torch.cos(torch.acos(near) + margin)
            else:
                near = near - margin * math.sin(margin)
            others = [s[i] @ unit(centre) for other, centre in begun.items() if other != label]
            total = total - torch.log(
                torch.exp(scale * near) / sum(torch.exp(scale * each) for each in (near, *others))
            )
            centres[label] = t[i] if label not in centres else alpha * centres[label] + (1 - alpha) * t[i]
        found.append((total.detach(), *torch.autograd.grad(total, student)))
    return found


@pytest.mark.parametrize("form, hard", [("angle", False), ("angle", True), ("cosine", False)])
def test_centres_move_by_one_example_after_another_and_the_margin_is_of_the_own_class(form, hard):
    assert_alike(values_of("adadistill", form=form, hard=hard, scale=8.0, margin=0.4), centres_by_loops(form, hard))


def test_the_angle_is_that_of_the_far_side_too():
    (term,) = parse_objective({"adadistill": {"margin": 0.5}}).terms().values()
    angles = torch.linspace(0.01, 3.13, 200, dtype=torch.float64)
    found = term.with_margin(angles.cos())
    turned = angles + 0.5 < math.pi
    torch.testing.assert_close(found[turned], (angles + 0.5).cos()[turned])
    assert (found.diff() < 0).sum() >= 198 and found.min() < -1, "it falls, but for the one step between the two forms"


def test_a_text_has_one_key_wherever_its_padding_is_and_no_other_text_has_it():
    left, right = torch.tensor([[0, 0, 5, 7, 9]]), torch.tensor([[5, 7, 9, 0, 0]])
    keys = [text_keys(ids, (ids > 0).long()) for ids in (left, right)]
    assert torch.equal(*keys) and keys[0].item() != UNKNOWN
    ids = torch.cartesian_prod(*[torch.arange(12)] * 4)
    lengths = torch.arange(5)[:, None]
    found = [text_keys(ids, (torch.arange(4) < length).expand_as(ids)) for length in lengths]
    assert [len(each.unique()) for each in found] == [1, 12, 144, 1728, 20736]
    assert len(torch.cat(found).unique()) == 1 + 12 + 144 + 1728 + 20736
    assert text_keys(None, torch.ones(2, 3)).tolist() == [UNKNOWN] * 2


STATEFUL = TERMS["remembered"]


def remembered(folder, data, losses=STATEFUL, **settings):
    teacher = tiny_model(layers=4, **NO_DROPOUT)
    student = tiny_model(layers=2, hidden=24, seed=1, **NO_DROPOUT)
    own = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, **settings}
    trainer = trainer_of(folder, student, teacher, data, losses, **own)
    trainer.train()
    return {
        **student.state_dict(),
        **trainer.terms.memories.state_dict(),
        **trainer.terms.projections.state_dict(),
    }, trainer


@pytest.mark.slow
def test_a_step_is_the_same_however_its_batch_is_split(tmp_path):
    data = rows(tiny_model(), count=24)
    whole, _ = remembered(tmp_path / "whole", data)
    split, trainer = remembered(tmp_path / "split", data, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert whole.keys() == split.keys() and "contrast.vectors" in whole and whole["contrast.count"] == 24
    for name, tensor in whole.items():
        torch.testing.assert_close(split[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
    assert all(log[f"loss/{name}"] > 0 for name in STATEFUL for log in trainer.state.log_history[1:3])


@pytest.mark.slow
def test_a_step_that_is_skipped_leaves_no_trace_in_queues_and_centres(tmp_path):
    data = rows(tiny_model(), count=24)
    folder = tmp_path / "run"
    _, trainer = remembered(folder, data, max_steps=1)
    before = {name: each.clone() for name, each in trainer.terms.memories.state_dict().items()}
    trainer.sums.in_a_row = 1
    batch = {name: torch.stack([row[name] for row in data[:4]]) for name in data[0]}
    trainer.compute_loss(trainer.model.train(), batch)
    for callback in trainer.callback_handler.callbacks:
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
    trainer.sums.in_a_row = 0
    for callback in trainer.callback_handler.callbacks:
        callback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert all(torch.equal(each, before[name]) for name, each in trainer.terms.memories.state_dict().items())


@pytest.mark.slow
def test_a_model_without_labels_learns_its_teachers_embeddings(tmp_path):
    """Cosines of both models' embeddings grow; nothing is asked of the head."""
    data = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in rows(tiny_model(), count=24)]
    settings = {"max_steps": 30, "optim": "adamw_torch", "learning_rate": 1e-2}
    _, trainer = remembered(tmp_path, data, {"qud": {"pool": "first", "queue": 16}}, **settings)
    losses = [log["loss/qud"] for log in trainer.state.log_history if "loss/qud" in log]
    assert losses[0] == 0 and sum(losses[-3:]) < sum(losses[3:6]) - 1.5, losses


@pytest.mark.slow
def test_a_resume_without_the_memory_of_the_terms_is_refused(tmp_path):
    data = rows(tiny_model(), count=24)
    saved = {"save_strategy": "steps", "save_steps": 1}
    remembered(tmp_path / "with", data, {"qud": {"queue": 4, "adapter": "interpolation"}}, **saved)
    remembered(tmp_path / "without", data, {"labels": {}}, **saved)
    assert (tmp_path / "with" / "checkpoint-1" / "terms.pt").is_file()
    assert not (tmp_path / "without" / "checkpoint-1" / "terms.pt").exists()
    for name, losses, words in (
        ("without", {"qud": {"queue": 4, "adapter": "interpolation"}}, "terms.pt is missing"),
        ("with", {"qud": {"queue": 5, "adapter": "interpolation"}}, "other sizes"),
        ("with", {"contrast": {"queue": 4, "adapter": "interpolation"}}, "other terms than contrast"),
    ):
        student, teacher = tiny_model(layers=2, hidden=24, seed=1), tiny_model(layers=4)
        trainer = trainer_of(tmp_path / "again", student, teacher, data, losses, max_steps=3)
        with pytest.raises(InputError, match=words) as error:
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-1"))
        assert "\n" not in str(error.value) and len(str(error.value)) <= 300 + len(str(tmp_path))


@pytest.mark.parametrize("losses", [{"adadistill": {}}, {"contrast": {"negatives": "other_classes"}}], ids=str)
@pytest.mark.parametrize("use", [Use(kind="token"), Use(single_output=True), Use(mixed="data.augment.mixup")], ids=str)
def test_classes_must_be_classes_of_examples(losses, use):
    (name,) = losses
    assert [fault.field.split(".")[1] for fault in parse_objective(losses).faults(use)] == [name]
    assert not parse_objective({"qud": {}, "contrast": {}}).faults(use)
