"""What the trainer refuses."""

import copy

import pytest
import torch
import transformers
from builders.models import tiny_model
from builders.trainers import causal_model, rows, trainer_of
from datasets import Dataset
from transformers import TrainingArguments

from distill_llm.common.errors import InputError
from distill_llm.training.trainer import DistillationConfig, DistillationTrainer


@pytest.mark.parametrize(
    "change, words",
    [
        ({"teacher": None}, "teacher: not given"),
        ({"teacher": {"num_labels": 3}}, "3 labels.*\\(2\\)"),
        ({"teacher": {"vocab": 120}}, "120 entries"),
        ({"teacher": {"head": "masked-lm"}}, "BertForMaskedLM"),
        ({"teacher": {"num_labels": 1}, "student": {"num_labels": 1}}, "losses.logits.divergence.*mse"),
        ({"student": {"problem_type": "multi_label_classification"}}, "problem_type: .*multi_label_classification"),
        ({"student": {"problem_type": "regression"}}, "num_labels: got 2; accepted: 1 for a regression"),
        ({"student": {"head": "token-classification", "num_labels": 1}}, "num_labels: got 1"),
        ({"settings": {"model_init": tiny_model}}, "model_init: "),
        ({"settings": {"compute_loss_func": print}}, "compute_loss_func: "),
        ({"settings": {"torch_compile": True}}, "torch_compile: got True; leave it out: losses read values"),
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
    "name", ["BertModel", "BertForQuestionAnswering", "BertForMultipleChoice", "BertForPreTraining"]
)
def test_a_head_whose_outputs_the_trainer_does_not_know_is_refused_in_one_line(tmp_path, name):
    student = getattr(transformers, name)(tiny_model().config)
    with pytest.raises(InputError, match=f"model: got '{name}'.*ForTokenClassification") as error:
        trainer_of(tmp_path, student, None, [], {"labels": {}})
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
    assert said == ["Training on one of 2 devices. To use them all, put `accelerate launch` in front of the command."]
    trainer.train()
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)
    for name, parameter in expected.model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name), parameter, rtol=0, atol=0)


def ids_of(*rows: list[int], **columns: list) -> Dataset:
    """Rows of a language model, each token its own label."""
    masks = [[1] * len(ids) for ids in rows]
    return Dataset.from_dict({"input_ids": rows, "attention_mask": masks, "labels": rows, **columns})


class OnTheFly(torch.utils.data.Dataset):
    """A data set whose rows are made when they are asked for: none is read at the door."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.tensor(values) for name, values in self.rows[index].items()}


@pytest.mark.parametrize("kind", [Dataset, list, OnTheFly])
@pytest.mark.parametrize("shorter", ["student", "teacher"])
def test_rows_longer_than_the_positions_of_student_or_teacher_are_refused(tmp_path, kind, shorter):
    sizes = [24 if name == shorter else 64 for name in ("student", "teacher")]
    student, teacher = (causal_model(layers=1, max_position_embeddings=size) for size in sizes)
    for length, passes in ((24, True), (25, False)):
        rows = ids_of([5] * 9, [7] * length)
        data = kind(rows.with_format("torch")) if kind is list else OnTheFly(rows) if kind is OnTheFly else rows
        settings = {"per_device_train_batch_size": 1, "max_steps": 2, "losses": {"logits": {}}}
        if passes:
            trainer_of(tmp_path, student, teacher, data, **settings).train()
            continue
        field = "input_ids" if kind is OnTheFly else "train_dataset"
        line = f"{field}: got 'a row of 25 tokens'; accepted: rows of at most 24 tokens, the longest input of the {shorter}"
        with pytest.raises(InputError, match=f"^{line}$"):
            trainer = trainer_of(tmp_path, student, teacher, data, **settings)
            assert kind is OnTheFly
            trainer.train()


def test_rows_with_tokens_beyond_the_vocabulary_are_refused(tmp_path):
    student = causal_model(layers=1)  # of 100 tokens
    trainer_of(tmp_path, student, None, ids_of([5, 99], [7]), {"labels": {}})
    line = "^train_dataset: got 'token 100 in row 2'; accepted: texts whose tokens are among the 100 that the student knows$"
    with pytest.raises(InputError, match=line):
        trainer_of(tmp_path, student, None, ids_of([5, 99], [7], [8, 100, 101]), {"labels": {}})


@pytest.mark.parametrize("family", ["opt", "bloom", "falcon", "llama"])
def test_packed_rows_for_a_family_that_mixes_them_are_refused(tmp_path, family):
    student = causal_model(family, layers=1)
    whole = ids_of([5, 6, 7], [8, 9, 5], position_ids=[[0, 1, 2], [0, 1, 2]])
    packed = ids_of([5, 6, 7], [8, 9, 5], position_ids=[[0, 1, 2], [0, 1, 0]])
    trainer_of(tmp_path, student, None, whole, {"labels": {}})
    if family == "llama":
        trainer_of(tmp_path, student, None, packed, {"labels": {}})
        return
    with pytest.raises(InputError, match=f"^train_dataset: got 'packed rows'; leave packing out: {family} mixes"):
        trainer_of(tmp_path, student, None, packed, {"labels": {}})


def test_packed_rows_may_be_longer_than_the_positions_of_their_sequences(tmp_path):
    student = causal_model(layers=1, max_position_embeddings=8)
    rows = ids_of([5] * 16, position_ids=[[*range(8), *range(8)]])
    trainer_of(tmp_path, student, None, rows, {"labels": {}}).train()
    with pytest.raises(InputError, match="train_dataset: got 'a row of 9 tokens'"):
        trainer_of(tmp_path, student, None, ids_of([5] * 9, position_ids=[[*range(9)]]), {"labels": {}})


def test_each_of_several_sets_to_evaluate_on_is_named(tmp_path):
    student, fine = causal_model(layers=1, max_position_embeddings=8), ids_of([5] * 8)
    args = DistillationConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, losses={"labels": {}})
    given = {"fine": fine, "long": ids_of([5] * 9)}
    with pytest.raises(InputError, match="^eval_dataset.long: got 'a row of 9 tokens'"):
        DistillationTrainer(student, None, args, train_dataset=fine, eval_dataset=given)


def test_rows_that_the_trainer_was_not_made_with_are_read_before_they_are_scored(tmp_path):
    trainer = trainer_of(tmp_path, causal_model(layers=1), None, ids_of([5]), {"labels": {}})  # of 100 tokens
    fine, unknown = ids_of([5, 99]), ids_of([5, 99], [7, 100])
    assert trainer.evaluate(fine)["eval_loss"] > 0
    assert trainer.evaluate({"fine": fine})["eval_fine_loss"] > 0
    assert trainer.predict(fine).predictions.shape == (1, 2, 100)
    said = "got 'token 100 in row 1'; accepted: texts whose tokens are among the 100 that the student knows$"
    for call, given, field in (
        (trainer.evaluate, unknown, "eval_dataset"),
        (trainer.evaluate, {"fine": fine, "other": unknown}, "eval_dataset.other"),
        (trainer.predict, unknown, "test_dataset"),
    ):
        with pytest.raises(InputError, match=f"^{field}: {said}"):
            call(given)


def test_a_mixtures_own_loss_of_its_router_is_not_lost_unsaid(tmp_path):
    """transformers adds it where the config asks for it; the terms of an objective do not."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=100, num_key_value_heads=2, num_local_experts=2, **sizes)
    for asks, weight, refused in ((True, 0.01, True), (True, 0.0, False), (False, 0.01, False)):
        config.output_router_logits, config.router_aux_loss_coef = asks, weight
        student = transformers.MixtralForCausalLM(config)
        if not refused:
            trainer_of(tmp_path, student, None, rows(student), {"labels": {}})
            continue
        batch = {name: torch.stack([row[name] for row in rows(student)]) for name in rows(student)[0]}
        plain = student(**batch, output_router_logits=False).loss
        assert student(**batch).loss > plain  # what would be lost
        words = r"^model.config.output_router_logits: got True; set it to false: .*\(times 0.01\) would be lost"
        with pytest.raises(InputError, match=words):
            trainer_of(tmp_path, student, None, rows(student), {"labels": {}})
