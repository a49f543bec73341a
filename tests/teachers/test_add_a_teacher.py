"""Teachers of a user's own, as docs/development/add-a-teacher.md adds them: one class, and nothing else changes."""

import copy
import re
from pathlib import Path

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import NO_DROPOUT, causal_model, rows, trainer_of
from torch.nn import functional as F

from distill_llm.common.errors import InputError
from distill_llm.losses.signals import Signals
from distill_llm.teachers import OnlineTeacher, Teacher
from distill_llm.training.teacher_state import TEACHER_NAME

PAGE = Path(__file__).parents[2] / "docs" / "development" / "add-a-teacher.md"
AVERAGE, TRAINING, ENSEMBLE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
RATE, DECAY = 0.5, 0.9
SETTINGS = {
    "per_device_train_batch_size": 8,
    "learning_rate": RATE,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}


def from_page(block, name):
    names = {}
    exec(block, names)
    return names[name]


def stacked(data):
    return {name: torch.stack([row[name] for row in data]) for name in data[0]}


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def divergence(student, target):
    return F.kl_div(student.log_softmax(-1), target, reduction="none").sum(-1)


def test_the_page_trains_a_student_on_a_moving_average_of_itself_as_a_loop_by_hand_does(tmp_path):
    student = tiny_model(layers=2, **NO_DROPOUT)
    data = rows(student)
    own, average, batch = copy.deepcopy(student).train(), copy.deepcopy(student), stacked(data)
    labels = batch.pop("labels")
    names = {"folder": str(tmp_path), "settings": SETTINGS, "student": student, "rows": data}
    exec(AVERAGE + TRAINING, names)

    apart = []
    for _ in range(3):
        with torch.no_grad():
            target = average(**batch).logits.softmax(-1)
        logits = own(**batch).logits
        apart.append(divergence(logits, target).mean())
        (0.5 * F.cross_entropy(logits, labels) + 0.5 * apart[-1]).backward()
        with torch.no_grad():
            for weight, followed in zip(own.parameters(), average.parameters(), strict=True):
                if weight.grad is not None:
                    weight -= RATE * weight.grad
                    weight.grad = None
                followed.copy_(DECAY * followed + (1 - DECAY) * weight)

    trainer = names["trainer"]
    for found, expected in ((student, own), (trainer.teacher.model, average)):
        for (name, weight), other in zip(found.named_parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(weight, other, rtol=1e-4, atol=1e-6, msg=name)
    logged = [log["loss/logits"] for log in trainer.state.log_history if "loss/logits" in log]
    assert logged == pytest.approx([value.item() for value in apart], rel=1e-3, abs=1e-7)
    assert logged[0] == pytest.approx(0, abs=1e-7) and logged[2] > 1e-4


def test_a_moving_average_is_saved_and_resumed_bit_for_bit(tmp_path):
    make, student = from_page(AVERAGE, "MovingAverage"), causal_model(layers=2)
    data, losses = rows(student, count=16), {"labels": {}, "logits": {}, "hidden": {"layers": "uniform"}}
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "bf16": True}

    def trained(resume=None):
        own = copy.deepcopy(student)
        trainer = trainer_of(tmp_path, own, make(DECAY), data, losses, **settings)
        trainer.train(resume_from_checkpoint=resume)
        assert not ({id(p) for p in own.parameters()} & {id(p) for p in trainer.teacher.model.parameters()})
        return [*own.state_dict().values(), *trainer.teacher.model.state_dict().values()]

    whole = trained()
    checkpoint = tmp_path / "checkpoint-2"
    assert same(whole, trained(str(checkpoint)))
    kept = {**torch.load(checkpoint / TEACHER_NAME)}
    moved = {name: tensor + 1e-3 for name, tensor in kept.items()}
    torch.save(moved, checkpoint / TEACHER_NAME)
    assert not same(whole, trained(str(checkpoint)))
    (checkpoint / TEACHER_NAME).unlink()
    with pytest.raises(InputError, match=f"^resume_from_checkpoint: .*{TEACHER_NAME}"):
        trained(str(checkpoint))


def test_the_page_averages_the_probabilities_of_two_models(tmp_path):
    make = from_page(ENSEMBLE, "Ensemble")
    models = [tiny_model(layers=layers, seed=layers, **NO_DROPOUT) for layers in (3, 4)]
    student = tiny_model(layers=2, **NO_DROPOUT)
    data = rows(student)
    batch = stacked(data)
    labels = batch.pop("labels")
    with torch.no_grad():
        target = sum(model(**batch).logits.softmax(-1) for model in models) / 2
        expected = divergence(student(**batch).logits, target).mean().item()
    trainer = trainer_of(tmp_path, student, make(*models), data, {"logits": {}})
    trainer.train()
    assert len(labels) and trainer.state.log_history[0]["loss/logits"] == pytest.approx(expected, rel=1e-4)
    assert not (tmp_path / TEACHER_NAME).exists()
    with pytest.raises(InputError, match="^losses.hidden: .*Ensemble.*hidden"):
        trainer_of(tmp_path, student, make(*models), data, {"hidden": {"layers": "uniform"}})


def test_an_ensemble_of_language_models_gives_logits_where_the_student_could_do_without(tmp_path):
    make, student = from_page(ENSEMBLE, "Ensemble"), causal_model(layers=2, seed=1)
    teacher = causal_model()
    data = rows(student)
    logs = []
    for source in (teacher, make(teacher, teacher)):
        trainer = trainer_of(tmp_path, copy.deepcopy(student), source, data, {"logits": {}}, max_steps=2)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert (trainer.loss.head_terms is None) == (source is not teacher)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


class Changing(OnlineTeacher):
    """A later checkpoint for every two steps; notes what it was told."""

    def __init__(self, *models):
        super().__init__(models[0])
        self.checkpoints, self.told = [OnlineTeacher(model) for model in models], []

    def signals(self, batch, step=0, positions=None, compact=False):
        self.told.append(("signals", step))
        return self.checkpoints[step // 2].signals(batch, step, positions)

    def after_step(self, step):
        self.told.append(("after", step))

    def close(self):
        self.told.append(("close", None))


def test_a_teacher_may_change_by_step_and_is_told_of_every_step_and_of_the_end(tmp_path):
    first, second = (tiny_model(layers=2, seed=seed, **NO_DROPOUT) for seed in (1, 2))
    student = tiny_model(layers=2, **NO_DROPOUT)
    data, batch = rows(student, count=8), stacked(rows(student, count=8))
    del batch["labels"]
    teacher = Changing(first, second)
    settings = {"learning_rate": 0.0, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainer = trainer_of(tmp_path, student, teacher, data, {"logits": {}}, max_steps=3, **settings)
    trainer.train()
    with torch.no_grad():
        own = student(**batch).logits
        expected = [
            divergence(own, model(**batch).logits.softmax(-1)).mean().item() for model in (first, first, second)
        ]
    logged = [log["loss/logits"] for log in trainer.state.log_history if "loss/logits" in log]
    assert logged == pytest.approx(expected, rel=1e-4)
    steps = [told for step in range(3) for told in (("signals", step), ("signals", step), ("after", step + 1))]
    assert teacher.told == [*steps, ("close", None)]


def test_a_teacher_is_closed_when_a_training_fails(tmp_path):
    class Failing(Changing):
        def after_step(self, step):
            raise KeyboardInterrupt

    teacher = Failing(tiny_model(layers=2, seed=1))
    trainer = trainer_of(tmp_path, tiny_model(layers=2), teacher, rows(teacher.model), {"logits": {}})
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert teacher.told[-1] == ("close", None)


def test_what_is_no_teacher_is_refused(tmp_path):
    with pytest.raises(InputError, match="^teacher: got 'str'; accepted: a transformers model, .*Teacher, or None"):
        trainer_of(tmp_path, tiny_model(), "a folder", [], {"logits": {}})


class Answers(Teacher):
    """Gives what a function makes of the logits of a model."""

    def __init__(self, model, answer):
        self.inner, self.answer = OnlineTeacher(model), answer

    def meet(self, student, tokenizer=None):
        return self.inner.meet(student, tokenizer)

    def signals(self, batch, step=0, positions=None, compact=False):
        return self.answer(self.inner.signals(batch, step, positions).logits)


@pytest.mark.parametrize(
    "answer, words",
    [
        (lambda logits: logits, "got 'a Tensor'; return Signals"),
        (
            lambda logits: Signals(logits=logits[:, :-1]),
            r"got 'logits of shape \(\d+, {less}\)'; accepted: \(\d+, {all}\)",
        ),
        (
            lambda logits: Signals(logits=logits[1:]),
            r"got 'logits of shape .*accepted: \(\d+, {all}\): a row for each item",
        ),
        (lambda logits: Signals(logits=logits.sum()), r"got 'logits of shape \(\)'"),
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_signals_of_another_form_are_refused_at_the_first_batch(tmp_path, answer, words, causal):
    make = causal_model if causal else tiny_model
    student = make(layers=2)
    classes = 100 if causal else 2
    trainer = trainer_of(tmp_path, student, Answers(make(seed=1), answer), rows(student), {"logits": {}})
    with pytest.raises(InputError, match="^teacher.signals: " + words.format(less=classes - 1, all=classes)):
        trainer.train()


def test_signals_that_the_trainer_cannot_call_are_refused_when_it_is_made(tmp_path):
    class Short(Answers):
        def signals(self, batch):
            return batch

    with pytest.raises(
        InputError, match=r"^teacher: got 'Short with signals\(batch\)'; accepted: signals\(batch, step, "
    ):
        trainer_of(tmp_path, tiny_model(layers=2), Short(tiny_model(seed=1), None), [], {"logits": {}})


def test_the_checkpoint_of_a_teacher_with_a_state_is_not_resumed_with_a_plain_model(tmp_path):
    make, student = from_page(AVERAGE, "MovingAverage"), tiny_model(layers=2)
    data, settings = rows(student), {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer_of(tmp_path, copy.deepcopy(student), make(DECAY), data, {"logits": {}}, **settings).train()
    trainer = trainer_of(tmp_path, student, tiny_model(seed=1), data, {"logits": {}}, **settings)
    with pytest.raises(InputError, match="^resume_from_checkpoint: .*a model does not read its teacher.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
