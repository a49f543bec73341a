"""Steps whose numbers are not finite: one line, or skipped, and never a checkpoint of them."""

import copy
import math
import re

import pytest
import torch
from builders.trainers import cached, causal_model, model_of, rows, step_gradient, trainer_of

from distill_llm.common.errors import InputError
from distill_llm.common.finite import NotFinite
from distill_llm.losses.objective import parse_objective
from distill_llm.teachers import OnlineTeacher
from distill_llm.training.refusals import check_arguments
from distill_llm.training.trainer import DistillationConfig, DistillationTrainer

BOTH = {"labels": {"weight": 0.5}, "logits": {"weight": 0.5}}


class Faulty(OnlineTeacher):
    """A teacher whose logits of some batches are something else."""

    def __init__(self, model, value, *broken):
        super().__init__(model)
        self.value, self.broken, self.asked = value, broken, 0

    def signals(self, *args, **kwargs):
        found = super().signals(*args, **kwargs)
        if self.asked in self.broken:
            found.logits = found.logits.index_fill(-1, torch.tensor([0], device=found.logits.device), self.value)
        self.asked += 1
        return found


def one_line(error):
    assert isinstance(error.value, InputError) and "\n" not in str(error.value)
    return str(error.value)


def same(one, other):
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("head", ["sequence-classification", "causal-lm"])
@pytest.mark.parametrize("dtype", ["float32", "cached"])
def test_a_teacher_that_gives_nan_ends_training_before_its_first_step(tmp_path, head, dtype):
    teacher, student = model_of(head, layers=2), model_of(head, layers=1, seed=1)
    data = rows(teacher)
    source = teacher if dtype == "float32" else cached(tmp_path / "cache", teacher, data, k=2)
    if dtype == "cached":
        look_up = source.signals
        source.signals = lambda *args, **kwargs: _spoilt(look_up(*args, **kwargs))
    else:
        list(teacher.base_model.parameters())[-1].data.fill_(math.nan)
    before = copy.deepcopy(student.state_dict())
    trainer = trainer_of(tmp_path, student, source, data, BOTH)
    with pytest.raises(NotFinite, match="^the teacher's output is nan at step 1; give a teacher") as error:
        trainer.train()
    one_line(error)
    assert same(before, student.state_dict())


def _spoilt(signals):
    spoil = signals.targets.probabilities if hasattr(signals, "targets") else signals.logits
    spoil[0] = math.nan
    return signals


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize(
    "settings, losses, words",
    [
        (
            {"learning_rate": 1e38},
            BOTH,
            r"^(losses.labels|a weight of the student) is (nan|inf).* at step [123]; lower learning_rate",
        ),
        ({}, {"labels": {"weight": 1e30}}, "^the norm of the gradient is (inf|nan)"),
        (
            {},
            {"labels": {}, "logits": {"weight": 3e38, "temperature": 100.0}},
            "^the (whole loss|norm of the gradient) is",
        ),
    ],
)
def test_what_overflows_ends_in_one_line_that_says_where_and_when(tmp_path, settings, losses, words, clip):
    teacher, student = model_of("causal-lm", layers=2), model_of("causal-lm", layers=1, seed=1)
    trainer = trainer_of(
        tmp_path / "run", student, teacher, rows(teacher), losses, max_steps=4, optim="sgd", max_grad_norm=clip,
        save_strategy="steps", save_steps=1, **settings,
    )  # fmt: skip
    if clip and "learning_rate" not in settings:
        words = "^the (whole loss|norm of the gradient) is"
    with pytest.raises(NotFinite, match=words) as error:
        trainer.train()
        trainer.save_model()
    one_line(error)
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        whole = causal_model(layers=1).from_pretrained(folder)
        assert all(parameter.isfinite().all() for parameter in whole.parameters())


def test_weights_that_the_last_step_makes_infinite_are_not_saved(tmp_path):
    """No later loss shows them: the step itself was finite."""
    student = model_of("sequence-classification", 1)
    trainer = trainer_of(
        tmp_path, student, None, rows(student), {"labels": {"weight": 1e4}}, optim="sgd", learning_rate=1e38,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    for work in (trainer.train, trainer.save_model):
        with pytest.raises(NotFinite, match="^a weight of the student is (-inf|inf|nan) in .* at step 1; lower"):
            work()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_term_that_is_infinite_is_named_though_the_gradient_is_finite(tmp_path):
    """The teacher says what the student, whose bias masks the class, cannot."""
    teacher, student = model_of("sequence-classification", 2), model_of("sequence-classification", 1, seed=1)
    student.classifier.bias.data[0] = -math.inf
    student.classifier.bias.requires_grad_(False)
    trainer = trainer_of(tmp_path, student, teacher, rows(teacher), {"logits": {}})
    with pytest.raises(NotFinite, match="^losses.logits is inf at step 1; lower"):
        trainer.train()


def test_a_class_that_both_mask_is_trained_around_and_saved(tmp_path):
    teacher, student = (
        model_of("sequence-classification", 2, num_labels=3),
        model_of("sequence-classification", 1, 1, num_labels=3),
    )
    data = [{**row, "labels": torch.tensor(1)} for row in rows(teacher)]
    for model in (teacher, student):
        model.classifier.bias.data[0] = -math.inf
    trainer = trainer_of(tmp_path, student, teacher, data, BOTH, max_steps=3, save_strategy="steps", save_steps=3)
    trainer.train()
    saved = type(student).from_pretrained(tmp_path / "checkpoint-3")
    assert saved.classifier.bias[0] == -math.inf
    assert all(math.isfinite(value) for log in trainer.state.log_history for value in log.values())


@pytest.mark.grid(1)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_is_as_if_its_rows_had_not_been_there(tmp_path, clip, value):
    """Steps 2 and 5 of 6 are skipped: Adam's moments and the weights are those of the other four; the schedule is constant."""
    teacher, student = model_of("sequence-classification", 2), model_of("sequence-classification", 1, seed=1)
    data = rows(teacher, count=24)
    settings = {
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "constant",
        "max_grad_norm": clip, "logging_steps": 6, "train_sampling_strategy": "sequential",
    }  # fmt: skip
    kept = [row for start in (0, 8, 12, 20) for row in data[start : start + 4]]
    plain = copy.deepcopy(student)
    expected = trainer_of(tmp_path, plain, teacher, kept, BOTH, max_steps=4, **{**settings, "logging_steps": 4})
    expected.train()
    trainer = trainer_of(
        tmp_path, student, Faulty(teacher, value, 2, 9), data, BOTH, max_steps=6, on_nonfinite="skip", **settings
    )
    trainer.train()
    assert same(plain.state_dict(), student.state_dict())
    log, reference = (each.state.log_history for each in (trainer, expected))
    assert log[0]["skipped_steps"] == 2 and "skipped_steps" not in reference[0]
    for name in ("loss", "loss/labels", "loss/logits"):
        assert log[0][name] == pytest.approx(reference[0][name], rel=1e-5), name
    assert log[-1]["train_loss"] == pytest.approx(reference[-1]["train_loss"], rel=1e-5)


def test_training_that_skips_everything_ends_in_one_line(tmp_path):
    teacher, student = model_of("sequence-classification", 1), model_of("sequence-classification", 1, seed=1)
    source = Faulty(teacher, math.nan, *range(100))
    trainer = trainer_of(tmp_path, student, source, rows(teacher), BOTH, max_steps=50, on_nonfinite="skip")
    with pytest.raises(NotFinite, match="at step 11") as error:
        trainer.train()
    one_line(error)


def test_a_short_training_that_skips_every_step_ends_in_one_line_and_one_that_keeps_a_step_does_not(tmp_path):
    teacher, student = model_of("sequence-classification", 1), model_of("sequence-classification", 1, seed=1)
    source = Faulty(teacher, math.nan, 0, 1, 2)
    for steps in (3, 4):
        source.asked = 0
        trainer = trainer_of(tmp_path, student, source, rows(teacher), BOTH, max_steps=steps, on_nonfinite="skip")
        if steps == 4:
            trainer.train()
            assert sum(log.get("skipped_steps", 0) for log in trainer.state.log_history) == 3
            continue
        with pytest.raises(NotFinite, match="^the teacher's output is nan at step 3"):
            trainer.train()


def test_steps_that_deepspeed_takes_cannot_be_skipped(tmp_path):
    """Its engine updates the weights in `backward`, before the trainer sees the norm of the gradient."""
    student = model_of("sequence-classification", 1)
    for on_nonfinite, refused in (("skip", True), ("stop", False)):
        args = DistillationConfig(
            str(tmp_path), report_to=[], use_cpu=True, losses={"labels": {}}, on_nonfinite=on_nonfinite
        )
        args.deepspeed_plugin = object()
        objective = parse_objective(args.losses)
        if not refused:
            check_arguments(args, objective, {})
            continue
        with pytest.raises(InputError, match="^on_nonfinite: got 'skip'; set it to stop: DeepSpeed takes each step"):
            DistillationTrainer(student, None, args)


def test_a_student_with_a_weight_that_is_nan_is_refused_before_training_even_where_no_row_uses_it(tmp_path):
    teacher, student = causal_model(layers=1), causal_model(layers=1, seed=1)
    student.get_input_embeddings().weight.data[99] = math.nan
    with pytest.raises(NotFinite, match=r"^a weight is nan in model\.embed_tokens\.weight; .*set to 0"):
        trainer_of(tmp_path, student, teacher, rows(teacher), BOTH)


def test_a_teachers_rows_that_no_token_uses_are_harmless(tmp_path):
    teacher, student = causal_model(layers=1), causal_model(layers=1, seed=1)
    data = rows(teacher)
    assert all((row["input_ids"] != 99).all() for row in data)
    expected, _ = step_gradient(tmp_path, student, copy.deepcopy(teacher), data, BOTH)
    teacher.get_input_embeddings().weight.data[99] = math.nan
    found, _ = step_gradient(tmp_path, student, teacher, data, BOTH)
    assert same(expected, found)


def test_anything_but_stop_and_skip_is_refused(tmp_path):
    with pytest.raises(InputError, match=re.escape("on_nonfinite: got 'skipp'; accepted: 'skip' (the nearest)")):
        trainer_of(tmp_path, model_of("causal-lm", 1), None, [], {"labels": {}}, on_nonfinite="skipp")
