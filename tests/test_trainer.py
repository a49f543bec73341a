"""The trainer: exact reduction, exact resume, nothing of teacher or projections in the student, clear refusals."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from helpers import random_batch, tiny_model
from safetensors import safe_open
from transformers import PreTrainedModel

from distill_llm.errors import InputError
from distill_llm.pruning.modeling_pruned import LayerLineage, pruned_class, set_lineage
from distill_llm.sampling import GlobalBatchSampler
from distill_llm.trainer import PROJECTIONS_NAME, DistillationConfig, DistillationTrainer

TERMS = {
    "labels": {"labels": {}},
    "logits": {"logits": {"temperature": 2.0}},
    "hidden": {"hidden": {"layers": "uniform"}},
    "cosine": {"hidden": {"layers": "uniform", "distance": "cosine"}},
    "attention": {"attention": {"layers": "uniform"}},
    "attention_mse": {"attention": {"layers": "last", "distance": "mse"}},
    "all": {
        "labels": {"weight": 0.3},
        "logits": {"weight": 0.7, "divergence": "jsd"},
        "hidden": {"layers": "uniform"},
        "attention": {"layers": "uniform"},
    },
}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pruned_student(teacher: PreTrainedModel) -> PreTrainedModel:
    """Layers 1 and 3 of a four-layer teacher, with some of its heads and neurons."""
    config = copy.deepcopy(teacher.config)
    set_lineage(config, [LayerLineage(1, (0, 2), tuple(range(40))), LayerLineage(3, (1, 2, 3), tuple(range(9, 64)))])
    student = pruned_class(type(teacher))(config)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.normal_(0, 0.2)
    return student.eval()


def rows(model: PreTrainedModel, count: int = 8, length: int = 10, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    batch = random_batch(model, batch=count, length=length, seed=seed)
    return [{name: tensor[i] for name, tensor in batch.items()} for i in range(count)]


def trainer_of(folder, student, teacher, data, losses, **settings) -> DistillationTrainer:
    defaults = {
        "per_device_train_batch_size": 8,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
    }
    args = DistillationConfig(output_dir=str(folder), losses=losses, **{**defaults, **settings})
    return DistillationTrainer(model=student, teacher=teacher, args=args, train_dataset=data, eval_dataset=data)


def step_gradient(
    folder, student, teacher, data, losses, **settings
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients of one optimizer step and the first log, by way of the whole Trainer."""
    found: dict[str, torch.Tensor] = {}
    student = copy.deepcopy(student)
    trainer = trainer_of(folder, student, teacher, data, losses, optim="sgd", **settings)
    step = trainer.create_optimizer().step

    def keep(*args, **kwargs):
        found.update({name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None})
        found.update({f"projection {name}": p.grad.clone() for name, p in trainer.terms.projections.named_parameters()})
        return step(*args, **kwargs)

    trainer.optimizer.step = keep
    trainer.train()
    return found, trainer.state.log_history[0]


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm"])
def test_four_uneven_micro_batches_give_the_gradient_and_log_of_one_batch(tmp_path, name, head):
    teacher, student = (
        tiny_model(layers=4, head=head, **NO_DROPOUT),
        tiny_model(layers=2, head=head, seed=1, **NO_DROPOUT),
    )
    data = rows(teacher)
    whole, log = step_gradient(tmp_path, student, teacher, data, TERMS[name])
    parts, parts_log = step_gradient(
        tmp_path, student, teacher, data, TERMS[name], per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert whole.keys() == parts.keys() and len(whole) > 5
    for parameter, gradient in whole.items():
        torch.testing.assert_close(parts[parameter], gradient, rtol=1e-4, atol=1e-6, msg=parameter)
    for key in log:
        if key.startswith("loss"):
            assert parts_log[key] == pytest.approx(log[key], rel=1e-5), key


def test_the_labels_term_has_the_gradient_of_the_models_own_loss(tmp_path):
    student = tiny_model(**NO_DROPOUT)
    data = rows(student)
    found, log = step_gradient(tmp_path, student, None, data, {"labels": {}})
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    loss = student(**batch).loss
    loss.backward()
    assert log["loss"] == log["loss/labels"] == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, student.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_a_micro_batch_without_any_label_or_with_one_valid_token_keeps_gradients_finite(tmp_path):
    teacher = tiny_model(head="masked-lm", **NO_DROPOUT)
    data = rows(teacher, count=4)
    for row in data[:2]:
        row["labels"] = torch.full_like(row["labels"], -100)
        row["attention_mask"] = torch.tensor([1] + [0] * 9)
    found, log = step_gradient(
        tmp_path,
        tiny_model(head="masked-lm", seed=1),
        teacher,
        data,
        {"labels": {}},
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
    )
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert log["loss"] > 0


@pytest.mark.parametrize("teacher_head", [True, False])
def test_masked_lm_logits_are_made_at_valid_tokens_only_and_give_the_loss_of_whole_logits(tmp_path, teacher_head):
    teacher, student = (
        tiny_model(head="masked-lm", **NO_DROPOUT),
        tiny_model(head="masked-lm", layers=2, seed=1, **NO_DROPOUT),
    )
    data = rows(teacher)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    losses = {"labels": {}, "logits": {"temperature": 2.0}} if teacher_head else {"labels": {}}
    trainer = trainer_of(tmp_path, student, teacher if teacher_head else None, data, losses)
    student.train()
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    items = batch["attention_mask"].bool() & ((batch["labels"] != -100) | torch.tensor(teacher_head))
    assert outputs.logits.shape == (int(items.sum()), 100)
    labels, inputs = batch["labels"], {name: batch[name] for name in ("input_ids", "attention_mask")}
    logits = student(**inputs).logits
    expected = torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100])
    if teacher_head:
        p = (teacher(**inputs).logits[items] / 2).softmax(-1)
        q = (logits[items] / 2).softmax(-1)
        expected = expected + 4 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(loss, expected)


def test_lineage_gives_zero_hidden_and_attention_loss_for_an_unchanged_copy(tmp_path):
    teacher = tiny_model(layers=3, **NO_DROPOUT)
    config = copy.deepcopy(teacher.config)
    set_lineage(config, [LayerLineage(i, (0, 1, 2, 3), tuple(range(64))) for i in range(3)])
    student = pruned_class(type(teacher))(config)
    student.load_state_dict(teacher.state_dict())
    losses = {"logits": {}, "hidden": {}, "attention": {}}
    _, log = step_gradient(tmp_path, student, teacher, rows(teacher), losses)
    assert log["loss/hidden"] == pytest.approx(0, abs=1e-9)
    assert log["loss/attention"] == pytest.approx(0, abs=1e-6)
    assert log["loss/logits"] == pytest.approx(0, abs=1e-6)


def test_lineage_compares_each_head_with_the_head_it_came_from(tmp_path):
    teacher = tiny_model(layers=4, attn_implementation="eager", **NO_DROPOUT)
    student = pruned_student(teacher)
    data = rows(teacher)
    _, log = step_gradient(tmp_path, student, teacher, data, {"labels": {}, "attention": {}})
    batch = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
    plain = copy.deepcopy(student)
    plain.set_attn_implementation("eager")
    maps = [model.eval()(**batch, output_attentions=True).attentions for model in (plain, teacher)]
    valid, total = batch["attention_mask"].float(), 0.0
    for layer, source, heads in ((0, 1, [0, 2]), (1, 3, [1, 2, 3])):
        p, q = maps[1][source][:, heads], maps[0][layer]
        rows_kl = torch.xlogy(p, p / q.clamp(min=1e-30)).sum(-1).mean(1)
        total = total + (rows_kl * valid).sum() / valid.sum() / 2
    assert log["loss/attention"] == pytest.approx(float(total), rel=1e-4)


@pytest.mark.parametrize("losses", [TERMS["all"], TERMS["attention"]], ids=["all", "attention"])
def test_gradient_checkpointing_gives_the_same_gradient(tmp_path, losses):
    teacher, student = tiny_model(layers=4, **NO_DROPOUT), tiny_model(layers=2, seed=1, **NO_DROPOUT)
    data = rows(teacher)
    plain, _ = step_gradient(tmp_path, student, teacher, data, losses)
    checkpointed, _ = step_gradient(tmp_path, student, teacher, data, losses, activation_checkpointing=True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_teacher_is_unchanged_and_without_dropout_even_after_a_wrapper_put_it_into_training_mode(tmp_path):
    teacher, student = tiny_model(hidden_dropout_prob=0.5), tiny_model(layers=2, seed=1)
    before = copy.deepcopy(teacher.state_dict())
    trainer = trainer_of(tmp_path, student, teacher, rows(teacher), TERMS["all"], bf16=True)
    batch = random_batch(teacher, labels=False)
    first = trainer.teacher(batch)
    trainer.teacher.model.train()
    second = trainer.teacher(batch)
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


def test_resumed_training_ends_with_the_weights_of_an_uninterrupted_run(tmp_path):
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
    trainer = trainer_of(tmp_path / "run", whole, teacher, data, TERMS["all"], **settings)
    trainer.train()
    projections = trainer.terms.projections.state_dict()
    resumed = copy.deepcopy(student)
    torch.manual_seed(99)
    trainer = trainer_of(tmp_path / "again", resumed, teacher, data, TERMS["all"], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-7"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert all(torch.equal(p, projections[name]) for name, p in trainer.terms.projections.state_dict().items())


def test_each_log_has_the_mean_of_every_term_since_the_last_log(tmp_path):
    teacher, student = tiny_model(layers=4, **NO_DROPOUT), tiny_model(layers=2, seed=1, **NO_DROPOUT)
    data = rows(teacher)
    logs = {}
    for every in (1, 2):
        trainer = trainer_of(
            tmp_path,
            copy.deepcopy(student),
            teacher,
            data,
            TERMS["all"],
            per_device_train_batch_size=2,
            max_steps=4,
            logging_steps=every,
        )
        trainer.train()
        logs[every] = [log for log in trainer.state.log_history if "loss" in log]
    for i, log in enumerate(logs[2]):
        for key in ("loss", "loss/labels", "loss/logits", "loss/hidden", "loss/attention"):
            assert log[key] == pytest.approx((logs[1][2 * i][key] + logs[1][2 * i + 1][key]) / 2, rel=1e-5)
        total = 0.3 * log["loss/labels"] + 0.7 * log["loss/logits"] + log["loss/hidden"] + log["loss/attention"]
        assert log["loss"] == pytest.approx(total, rel=1e-5)


def test_evaluation_reports_the_label_loss_and_the_metrics_on_whole_logits(tmp_path):
    student, teacher = tiny_model(layers=2, head="masked-lm"), tiny_model(head="masked-lm", seed=1)
    data = rows(student, count=4)
    trainer = trainer_of(tmp_path, student, teacher, data, TERMS["all"])
    shapes = []

    def metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"one": 1.0}

    trainer.compute_metrics = metrics
    result = trainer.evaluate()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    assert result["eval_loss"] == pytest.approx(student(**batch).loss.item(), rel=1e-5)
    assert result["eval_one"] == 1.0 and shapes == [((4, 10, 100), (4, 10))]


def test_a_regression_student_learns_labels_and_logits_by_squared_error(tmp_path):
    teacher, student = tiny_model(num_labels=1, **NO_DROPOUT), tiny_model(num_labels=1, layers=2, seed=1, **NO_DROPOUT)
    data = rows(teacher)
    _, log = step_gradient(tmp_path, student, teacher, data, {"labels": {}, "logits": {"divergence": "mse"}})
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    labels = batch.pop("labels")
    own, target = student(**batch).logits.squeeze(-1), teacher(**batch).logits.squeeze(-1)
    assert log["loss/labels"] == pytest.approx((own - labels).square().mean().item(), rel=1e-4)
    assert log["loss/logits"] == pytest.approx((own - target).square().mean().item(), rel=1e-4)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"teacher": None}, "teacher: got None"),
        ({"teacher": {"num_labels": 3}}, "3 labels.*\\(2\\)"),
        ({"teacher": {"vocab": 120}}, "120 entries"),
        ({"teacher": {"head": "masked-lm"}}, "BertForMaskedLM"),
        ({"teacher": {"num_labels": 1}, "student": {"num_labels": 1}}, "losses.logits.divergence.*mse"),
        ({"losses": {"hidden": {}}}, "losses.hidden.layers.*uniform"),
        ({"losses": {"hidden": {"layers": [[9, 0]]}}}, "losses.hidden.layers"),
        ({"losses": {"logits": {"temperature": 0}}}, "losses.logits.temperature"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line_before_training(tmp_path, change, words):
    teacher = change.get("teacher", {})
    with pytest.raises(InputError, match=words) as error:
        trainer_of(
            tmp_path,
            tiny_model(layers=2, **change.get("student", {})),
            None if teacher is None else tiny_model(seed=1, **teacher),
            [],
            change.get("losses", {"logits": {}}),
        )
    assert "\n" not in str(error.value)


def test_a_model_cannot_be_its_own_teacher(tmp_path):
    model = tiny_model()
    with pytest.raises(InputError, match="itself"):
        trainer_of(tmp_path, model, model, [], {"logits": {}})


@pytest.mark.parametrize("lengths", [None, [i % 7 + 1 for i in range(50)]], ids=["random", "grouped"])
def test_the_sampler_covers_the_data_in_whole_global_batches_and_repeats_by_epoch(lengths):
    epoch = 0
    sampler = GlobalBatchSampler(50, 8, seed=1, epoch=lambda: epoch, lengths=lengths)
    first = list(sampler)
    assert len(first) == len(sampler) == 56 and set(first) == set(range(50))
    assert list(sampler) == first
    epoch = 1
    assert list(sampler) != first
    assert len(list(GlobalBatchSampler(50, 8, 1, lambda: 0, lengths, drop_last=True))) == 48


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
    first = trainer.teacher(batch).logits
    batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
    assert not torch.equal(trainer.teacher(batch).logits, first)
    trainer.train()


PROCESS_CASES = [
    ("sequence-classification", 32, ["labels", "logits", "attention", "all"]),
    ("masked-lm", 24, ["labels", "hidden", "all"]),
]
SCRIPT = """
import json, os, sys
sys.path[:0] = {path!r}
import torch
from helpers import tiny_model
from test_trainer import NO_DROPOUT, TERMS, pruned_student, rows, trainer_of
processes = int(os.environ.get("WORLD_SIZE", 1))
found = {{}}
for head, width, names in {cases!r}:
    teacher = tiny_model(layers=4, head=head, **NO_DROPOUT)
    for name in names:
        student = tiny_model(layers=2, hidden=width, head=head, seed=1, **NO_DROPOUT)
        trainer = trainer_of(
            {folder!r}, student, teacher, rows(teacher, count=20), TERMS[name],
            max_steps=4, optim="sgd", learning_rate=0.1,
            per_device_train_batch_size=8 // processes, train_sampling_strategy="group_by_length", logging_steps=2,
        )
        trainer.train()
        history = [log for log in trainer.state.log_history if "loss" in log]
        logs = [{{k: v for k, v in log.items() if k.startswith("loss")}} for log in history]
        weights = {{**student.state_dict(), **trainer.terms.projections.state_dict(prefix="projection.")}}
        found[head + " " + name] = (weights, logs)
rank = os.environ.get("RANK", "0")
torch.save(found, {folder!r} + f"/{{processes}}-{{rank}}.pt")
"""


@pytest.fixture(scope="module")
def runs_of_one_and_two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    root = Path(__file__).parents[1]
    script = folder / "train.py"
    script.write_text(SCRIPT.format(cases=PROCESS_CASES, path=[str(root), str(root / "tests")], folder=str(folder)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], launcher):
        done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{name}.pt") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("head, name", [(head, name) for head, _, names in PROCESS_CASES for name in names])
def test_two_processes_train_as_one_on_the_same_global_batches(runs_of_one_and_two_processes, head, name):
    (one, one_logs), (two, two_logs), (other, _) = (run[f"{head} {name}"] for run in runs_of_one_and_two_processes)
    assert one.keys() == two.keys() == other.keys()
    for parameter, tensor in one.items():
        torch.testing.assert_close(two[parameter], tensor, rtol=2e-4, atol=2e-5, msg=parameter)
        assert torch.equal(two[parameter], other[parameter]), parameter
    assert len(one_logs) == 2
    for a, b in zip(one_logs, two_logs, strict=True):
        assert a == pytest.approx(b, rel=1e-4), json.dumps([a, b])
