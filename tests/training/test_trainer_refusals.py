"""What the trainer refuses."""

import copy

import pytest
import torch
import transformers
from builders.models import tiny_model
from builders.trainers import rows, trainer_of
from transformers import TrainingArguments

from distill_llm.common.errors import InputError
from distill_llm.training.trainer import DistillationTrainer


@pytest.mark.parametrize(
    "change, words",
    [
        ({"teacher": None}, "teacher: got None"),
        ({"teacher": {"num_labels": 3}}, "3 labels.*\\(2\\)"),
        ({"teacher": {"vocab": 120}}, "120 entries"),
        ({"teacher": {"head": "masked-lm"}}, "BertForMaskedLM"),
        ({"teacher": {"num_labels": 1}, "student": {"num_labels": 1}}, "losses.logits.divergence.*mse"),
        ({"student": {"problem_type": "multi_label_classification"}}, "problem_type: .*multi_label_classification"),
        ({"student": {"problem_type": "regression"}}, "num_labels: got 2; accepted: 1 for a regression"),
        ({"student": {"head": "token-classification", "num_labels": 1}}, "num_labels: got 1"),
        ({"settings": {"model_init": tiny_model}}, "model_init: "),
        ({"settings": {"compute_loss_func": print}}, "compute_loss_func: "),
        ({"settings": {"torch_compile": True}}, "torch_compile: got True; accepted: nothing: losses look into"),
        ({"losses": {"hidden": {}}}, "losses.hidden.layers.*uniform"),
        ({"losses": {"hidden": {"layers": [[9, 0]]}}}, "losses.hidden.layers"),
        ({"losses": {"logits": {"temperature": 0}}}, "losses.logits.temperature"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_training(tmp_path, monkeypatch, change, words):
    monkeypatch.setenv(
        "ACCELERATE_DYNAMO_BACKEND", "no"
    )  # TrainingArguments that compile set it, for all that come after
    teacher = change.get("teacher", {})
    with pytest.raises(InputError, match=words) as error:
        trainer_of(
            tmp_path,
            tiny_model(layers=2, **change.get("student", {})),
            None if teacher is None else tiny_model(seed=1, **teacher),
            [],
            change.get("losses", {"logits": {}}),
            **change.get("settings", {}),
        )
    assert "\n" not in str(error.value)


def test_a_model_cannot_be_its_own_teacher(tmp_path):
    model = tiny_model()
    with pytest.raises(InputError, match="itself"):
        trainer_of(tmp_path, model, model, [], {"logits": {}})


@pytest.mark.parametrize(
    "name",
    ["BertLMHeadModel", "BertModel", "BertForQuestionAnswering", "BertForMultipleChoice", "BertForPreTraining"],
)
def test_a_head_whose_outputs_the_trainer_does_not_know_is_refused_in_one_line(tmp_path, name):
    config = copy.deepcopy(tiny_model().config)
    config.is_decoder = name == "BertLMHeadModel"
    with pytest.raises(InputError, match=f"model: got '{name}'.*ForTokenClassification") as error:
        trainer_of(tmp_path, getattr(transformers, name)(config), None, [], {"labels": {}})
    assert "\n" not in str(error.value)


def test_what_is_no_model_is_refused(tmp_path):
    for model in (torch.nn.Linear(2, 2), None):
        with pytest.raises(InputError, match=f"model: got '{type(model).__name__}'"):
            trainer_of(tmp_path, model, None, [], {"labels": {}})


def test_arguments_of_another_kind_are_refused_in_one_line(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(InputError, match="args: got 'TrainingArguments'; accepted: a DistillationConfig"):
        DistillationTrainer(tiny_model(), None, args)
    with pytest.raises(InputError, match="teacher: got 'TrainingArguments'"):
        trainer_of(tmp_path, tiny_model(), args, [], {"labels": {}})


def test_a_scheduler_is_refused_where_projections_join_its_optimizer_and_an_optimizer_alone_is_not(tmp_path):
    teacher, student = tiny_model(), tiny_model(layers=2, hidden=24, seed=1)
    losses = {"hidden": {"layers": "last"}}
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(InputError, match="optimizers: got 'ConstantLR'"):
        trainer_of(tmp_path, student, teacher, rows(teacher), losses, optimizers=(optimizer, scheduler))
    trainer = trainer_of(tmp_path, student, teacher, rows(teacher), losses, optimizers=(optimizer, None))
    before = [parameter.clone() for parameter in trainer.terms.projections.parameters()]
    trainer.train()
    assert all(not torch.equal(a, b) for a, b in zip(before, trainer.terms.projections.parameters(), strict=True))


def test_floats_as_labels_of_several_classes_are_refused_at_the_first_batch(tmp_path):
    student = tiny_model()
    data = [{**row, "labels": torch.tensor([1.0, 0.0])} for row in rows(student)]
    with pytest.raises(InputError, match="labels: .*class ids"):
        trainer_of(tmp_path, student, None, data, {"labels": {}}).train()


def test_a_process_that_sees_several_devices_trains_on_the_first_and_says_so_once(tmp_path, monkeypatch, caplog):
    teacher, student = tiny_model(), tiny_model(layers=2, seed=1)
    data, settings = rows(teacher), {"use_cpu": False, "per_device_train_batch_size": 4, "num_train_epochs": 1}
    losses = {"labels": {}, "logits": {}}
    expected = trainer_of(tmp_path, copy.deepcopy(student), teacher, data, losses, **{**settings, "use_cpu": True})
    expected.train()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # here the first one is the CPU
    for _ in range(2):
        trainer = trainer_of(tmp_path, copy.deepcopy(student), teacher, data, losses, **settings)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 4
    said = [record.getMessage() for record in caplog.records if "accelerate launch" in record.getMessage()]
    assert said == ["Training on one of 2 devices; `accelerate launch` in front of the command uses them all."]
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=0, atol=0)
