"""What a training run keeps apart, saves and resumes: student, teacher, projections, data."""

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from builders.models import random_batch, tiny_model
from builders.trainers import TERMS, pruned_student, rows, trainer_of
from safetensors import safe_open

from distill_llm.architectures.modeling_pruned import CODE_NAMES
from distill_llm.common.errors import InputError
from distill_llm.teachers import OnlineTeacher
from distill_llm.training.companions import PROJECTIONS_NAME
from distill_llm.training.trainer import DistillationConfig, DistillationTrainer


def test_the_teacher_is_unchanged_and_without_dropout_even_after_a_wrapper_put_it_into_training_mode(tmp_path):
    teacher, student = tiny_model(hidden_dropout_prob=0.5), tiny_model(layers=2, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_of(tmp_path, student, teacher, rows(teacher), TERMS["all"], bf16=True)
    batch = random_batch(teacher, labels=False)
    first = trainer.teacher.signals(batch)
    trainer.teacher.model.train()
    second = trainer.teacher.signals(batch)
    assert torch.equal(first.logits, second.logits) and not second.logits.requires_grad
    assert trainer.teacher.model.dtype == torch.bfloat16 and teacher.dtype == torch.float32
    trainer.train()
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    ids = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not ids & {id(p) for p in trainer.teacher.model.parameters()}


def test_projections_learn_and_are_checkpointed_but_the_saved_student_has_its_own_keys_only(tmp_path):
    teacher, student = tiny_model(), tiny_model(layers=2, hidden=24, seed=1)
    keys = set(student.state_dict())
    trainer = trainer_of(
        tmp_path, student, teacher, rows(teacher), TERMS["hidden"], save_strategy="steps", save_steps=1
    )
    before = copy.deepcopy(trainer.terms.projections.state_dict())
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert all(not torch.equal(before[name], p) for name, p in trainer.terms.projections.state_dict().items())
    for folder in (tmp_path / "checkpoint-1", tmp_path / "final"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert set(file.keys()) == keys
        assert "distill" not in (folder / "config.json").read_text()
    assert (tmp_path / "checkpoint-1" / PROJECTIONS_NAME).exists()
    assert not (tmp_path / "final" / PROJECTIONS_NAME).exists()


@pytest.mark.parametrize(
    "terms", ["all", *(pytest.param(each, marks=pytest.mark.slow) for each in ("remembered", "stages"))]
)
def test_resumed_training_ends_with_the_weights_of_an_uninterrupted_run(tmp_path, terms):
    teacher, student = tiny_model(layers=4), tiny_model(layers=2, hidden=24, seed=1)
    assert student.config.hidden_dropout_prob > 0
    data = rows(teacher, count=20)
    settings = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "save_strategy": "steps",
        "save_steps": 7,
        "train_sampling_strategy": "group_by_length",
    }
    whole = copy.deepcopy(student)
    trainer = trainer_of(tmp_path / "run", whole, teacher, data, TERMS[terms], **settings)
    trainer.train()
    projections, memories = trainer.terms.projections.state_dict(), trainer.terms.memories.state_dict()
    assert len(memories) == (5 + 5 + 2 if terms == "remembered" else 0)
    resumed = copy.deepcopy(student)
    torch.manual_seed(99)
    trainer = trainer_of(tmp_path / "again", resumed, teacher, data, TERMS[terms], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert all(torch.equal(p, projections[name]) for name, p in trainer.terms.projections.state_dict().items())
    assert all(torch.equal(each, memories[name]) for name, each in trainer.terms.memories.state_dict().items())


@pytest.mark.slow
def test_a_resume_without_the_projections_or_with_those_of_other_layers_is_refused(tmp_path):
    teacher, data = tiny_model(layers=4), rows(tiny_model())
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    for name, losses in (("with", {"hidden": {"layers": "last"}}), ("without", {"labels": {}})):
        trainer_of(tmp_path / name, tiny_model(layers=2, hidden=24), teacher, data, losses, **saved).train()
    for name, layers, words in (
        ("without", "last", "projections.pt is missing"),
        ("with", "uniform", "projections.pt has other layers, or other sizes of them"),
    ):
        losses = {"hidden": {"layers": layers}}
        trainer = trainer_of(tmp_path / "again", tiny_model(layers=2, hidden=24), teacher, data, losses, **saved)
        with pytest.raises(InputError, match=words) as error:
            trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-1"))
        assert "\n" not in str(error.value) and len(str(error.value)) <= 300 + len(str(tmp_path))


def test_columns_are_kept_for_the_teacher_and_lengths_are_read_before_their_column_is_dropped(tmp_path):
    teacher, student = tiny_model(type_vocab_size=2), tiny_model("distilbert", layers=2)
    lengths = [3 + i % 5 for i in range(16)]
    columns = {name: [[1] * length for length in lengths] for name in ("input_ids", "attention_mask", "token_type_ids")}
    data = datasets.Dataset.from_dict({**columns, "labels": [0, 1] * 8, "length": lengths})
    trainer = trainer_of(
        tmp_path, student, teacher, data, {"logits": {}}, train_sampling_strategy="group_by_length", max_steps=2
    )
    trainer.data_collator = lambda batch: {
        name: torch.tensor([(row[name] + [0] * 8)[:8] if isinstance(row[name], list) else row[name] for row in batch])
        for name in batch[0]
    }
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert trainer._get_train_sampler().lengths == lengths
    first = trainer.teacher.signals(batch).logits
    batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    assert not torch.equal(trainer.teacher.signals(batch).logits, first)
    trainer.train()


def test_the_trainers_own_push_has_the_code_that_a_pruned_student_is_loaded_with(tmp_path, monkeypatch):
    teacher = tiny_model(layers=4)
    trainer = trainer_of(tmp_path / "run", pruned_student(teacher), teacher, rows(teacher), {"labels": {}})
    uploads = []

    def upload_folder(folder_path, **settings):
        uploads.append({path.name: path.read_text() for path in Path(folder_path).glob("*.py")})
        return SimpleNamespace(is_done=lambda: True)

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload_folder))
    trainer.hub_model_id, trainer.push_in_progress = "someone/student", None
    trainer.save_model(tmp_path / "checkpoint-1", _internal_call=True)
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-1"))
    source = Path(importlib.util.find_spec("distill_llm.architectures.modeling_pruned").origin).parent
    assert uploads == [{name: (source / name).read_text() for name in CODE_NAMES}]
    assert "modeling_pruned" in (tmp_path / "run" / "config.json").read_text()


@pytest.mark.parametrize("name, dtype", [("bf16", torch.bfloat16), ("fp16", torch.float16), (None, torch.float32)])
def test_teacher_and_projections_follow_the_mixed_precision_of_the_student(tmp_path, name, dtype):
    teacher, student = tiny_model(), tiny_model(layers=2, hidden=24, seed=1)
    args = DistillationConfig(str(tmp_path), losses=TERMS["hidden"], report_to=[], use_cpu=True)
    if name is not None:
        setattr(args, name, True)  # afterwards, since a CPU refuses fp16
    trainer = DistillationTrainer(student, teacher, args)
    products = []
    for linear in trainer.terms.projections.values():
        linear.register_forward_hook(lambda module, inputs, output: products.append(output.dtype))
    trainer.compute_loss(student.train(), random_batch(teacher))
    assert trainer.teacher.model.dtype == dtype and products == [dtype] * 2
    assert next(trainer.terms.projections.parameters()).dtype == torch.float32


def test_a_teacher_that_could_keep_a_cache_is_told_not_to():
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, pad_token_id=0)
    teacher = OnlineTeacher(transformers.GPT2ForSequenceClassification(config))
    caches = []
    teacher.model.transformer.register_forward_hook(lambda *args: caches.append(args[-1].past_key_values))
    batch = {"input_ids": torch.randint(3, 100, (2, 5)), "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    teacher.model(**batch)
    teacher.signals(batch)
    assert caches[0] is not None and caches[1] is None
