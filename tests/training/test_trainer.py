"""The trainer reduces exactly: gradients, losses and logs do not depend on how a batch was split."""

import copy

import pytest
import torch
from builders.models import tiny_model
from builders.trainers import (
    NO_DROPOUT,
    TERMS,
    Vocabulary,
    causal_model,
    model_of,
    pruned_student,
    rows,
    step_gradient,
    student_of_rows,
    trainer_of,
)

from distill_llm.architectures.lineage import LayerPlan
from distill_llm.training.trainer import DistillationTrainer


@pytest.mark.parametrize("name", [name for name in TERMS if name != "gathered"])  # relations of rows in one micro-batch
@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm", "causal-lm"])
def test_four_uneven_micro_batches_give_the_gradient_and_log_of_one_batch(tmp_path, name, head):
    if name == "remembered" and head != "sequence-classification":
        pytest.skip("class centres are of classes of examples")
    teacher, student = model_of(head, layers=4), model_of(head, layers=2, seed=1)
    data = rows(teacher)
    whole, log = step_gradient(tmp_path, student, teacher, data, TERMS[name])
    parts, parts_log = step_gradient(
        tmp_path, student, teacher, data, TERMS[name], per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    assert whole.keys() == parts.keys() and len(whole) > 5
    rounding = 1e-6 * max(1.0, *(gradient.abs().max().item() for gradient in whole.values()))
    for parameter, gradient in whole.items():
        torch.testing.assert_close(parts[parameter], gradient, rtol=1e-4, atol=rounding, msg=parameter)
    for key in log:
        if key.startswith("loss"):
            assert parts_log[key] == pytest.approx(log[key], rel=1e-5), key


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm", "causal-lm"])
def test_the_labels_term_has_the_gradient_of_the_models_own_loss(tmp_path, head):
    student = model_of(head, layers=3)
    data = rows(student)
    found, log = step_gradient(tmp_path, student, None, data, {"labels": {}})
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    loss = student(**batch).loss
    loss.backward()
    assert log["loss"] == log["loss/labels"] == pytest.approx(loss.item(), rel=1e-5)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, student.get_parameter(name).grad, rtol=1e-4, atol=1e-6)
    trainer = trainer_of(tmp_path, student, None, data, {"labels": {}})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("padding", ["right", "left"])
def test_a_causal_lm_learns_the_teachers_next_token_where_it_is_labelled_or_else_in_all_of_the_text(
    tmp_path, labelled, padding
):
    teacher, student = causal_model("gemma2"), causal_model("gemma2", layers=2, seed=1)
    data = rows(teacher)
    if padding == "left":
        data = [{name: row[name].roll(10 - int(row["attention_mask"].sum())) for name in row} for row in data]
    if not labelled:
        data = [{name: row[name] for name in ("input_ids", "attention_mask")} for row in data]
    _, log = step_gradient(tmp_path, student, teacher, data, {"logits": {"temperature": 2.0}})
    total, count = 0.0, 0
    for row in data:
        batch = {name: row[name][None] for name in ("input_ids", "attention_mask")}
        p, q = ((model(**batch).logits[0].double() / 2).softmax(-1) for model in (teacher, student))
        for t in range(9):
            if (
                row["attention_mask"][t]
                and row["attention_mask"][t + 1]
                and (not labelled or row["labels"][t + 1] >= 0)
            ):
                total, count = total + 4 * (p[t] * (p[t] / q[t]).log()).sum().item(), count + 1
    assert 20 < count < 72
    assert log["loss/logits"] == pytest.approx(total / count, rel=1e-4)


def test_neither_student_nor_teacher_keeps_a_cache_in_training(tmp_path):
    teacher, student = causal_model(), causal_model(layers=2, seed=1)
    trainer = trainer_of(tmp_path, student, teacher, rows(teacher), {"labels": {}, "logits": {}})
    caches = []
    for model in (teacher, student):
        model.config.use_cache = True
        model.model.register_forward_hook(lambda *args: caches.append(args[-1].past_key_values))
    trainer.train()
    assert caches == [None, None]


@pytest.mark.parametrize("unlabelled", [2, 4])
def test_micro_batches_without_any_label_and_with_one_valid_token_keep_gradients_finite(tmp_path, unlabelled):
    teacher = tiny_model(head="masked-lm", **NO_DROPOUT)
    data = rows(teacher, count=4)
    for row in data[:unlabelled]:
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
    assert (log["loss"] > 0) == (unlabelled < 4) and log["loss"] >= 0


@pytest.mark.parametrize("teacher_head", [True, False])
def test_a_masked_lm_head_gets_the_counted_tokens_only_and_gives_the_loss_of_whole_logits(tmp_path, teacher_head):
    teacher, student = (
        tiny_model(head="masked-lm", **NO_DROPOUT),
        tiny_model(head="masked-lm", layers=2, seed=1, **NO_DROPOUT),
    )
    data = rows(teacher)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    losses = {"labels": {}, "logits": {"temperature": 2.0}} if teacher_head else {"labels": {}}
    trainer = trainer_of(tmp_path, student, teacher if teacher_head else None, data, losses)
    student.train()
    seen = []
    handle = student.cls.predictions.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    loss, outputs = trainer.compute_loss(student, dict(batch), return_outputs=True)
    handle.remove()
    items = batch["attention_mask"].bool() & ((batch["labels"] != -100) | torch.tensor(teacher_head))
    assert seen == [(int(items.sum()), 32)] and outputs.logits.numel() == 0
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
    student = student_of_rows(teacher, [LayerPlan(i, (0, 1, 2, 3), tuple(range(64))) for i in range(3)])
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


def test_each_log_has_the_mean_of_every_term_since_the_last_log(tmp_path):
    teacher, student = tiny_model(layers=4, **NO_DROPOUT), tiny_model(layers=2, seed=1, **NO_DROPOUT)
    data = rows(teacher)
    losses = {**TERMS["all"], "labels": {"weight": 0.3}, "logits": {"weight": 0.7}}
    logs = {}
    for every in (1, 2):
        trainer = trainer_of(
            tmp_path,
            copy.deepcopy(student),
            teacher,
            data,
            losses,
            per_device_train_batch_size=2,
            max_steps=4,
            logging_steps=every,
        )
        trainer.train()
        logs[every] = [log for log in trainer.state.log_history if "loss" in log]
    for i, log in enumerate(logs[2]):
        for key in ("loss", *(f"loss/{term}" for term in losses)):
            assert log[key] == pytest.approx((logs[1][2 * i][key] + logs[1][2 * i + 1][key]) / 2, rel=1e-5)
        total = sum(settings.get("weight", 1.0) * log[f"loss/{term}"] for term, settings in losses.items())
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


def test_regression_labels_in_a_column_are_one_value_per_example(tmp_path):
    student = tiny_model(num_labels=1, **NO_DROPOUT)
    data = rows(student)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    own = student(**{**batch, "labels": None}).logits.squeeze(-1)
    expected = (own - batch["labels"]).square().mean().item()
    for row in data:
        row["labels"] = row["labels"].view(1)
    _, log = step_gradient(tmp_path, student, None, data, {"labels": {}})
    assert log["loss/labels"] == pytest.approx(expected, rel=1e-4)
    trainer = trainer_of(tmp_path, student, None, data, {"labels": {}})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("head", ["masked-lm", "token-classification"])
def test_labels_at_padding_count_neither_in_training_nor_in_evaluation(tmp_path, head):
    student = tiny_model(layers=2, head=head, **NO_DROPOUT)
    data = rows(student)
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    expected = student(**batch).loss.item()
    for row in data:
        row["labels"] = row["labels"].masked_fill(row["attention_mask"] == 0, 1)
    trainer = trainer_of(tmp_path, student, None, data, {"labels": {}})
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
    _, log = step_gradient(tmp_path, student, None, data, {"labels": {}})
    assert log["loss/labels"] == pytest.approx(expected, rel=1e-5)


def test_the_hidden_term_is_a_mean_over_valid_tokens_and_padding_does_not_count(tmp_path):
    teacher, student = tiny_model(layers=4, **NO_DROPOUT), tiny_model(layers=2, seed=1, **NO_DROPOUT)
    data = rows(teacher)
    _, log = step_gradient(tmp_path, student, teacher, data, {"hidden": {"layers": "uniform"}})
    batch = {name: torch.stack([row[name] for row in data]) for name in ("input_ids", "attention_mask")}
    own, target = (model(**batch, output_hidden_states=True).hidden_states for model in (student, teacher))
    valid = batch["attention_mask"].bool()
    assert not valid.all()
    distances = [(own[i + 1] - target[j + 1])[valid].square().mean() for i, j in ((0, 1), (1, 3))]
    assert log["loss/hidden"] == pytest.approx((sum(distances) / 2).item(), rel=1e-5)


def test_random_padding_of_both_vocabularies_leaves_the_divergence_of_an_identical_model_zero(tmp_path):
    words, student = 90, tiny_model(head="masked-lm", vocab=100, **NO_DROPOUT)
    teacher = tiny_model(head="masked-lm", vocab=128, seed=1, **NO_DROPOUT)
    known = student.state_dict()
    with torch.no_grad():
        for name, tensor in teacher.state_dict().items():
            part = slice(words if tensor.shape != known[name].shape else None)
            tensor[part] = known[name][part]
    data = rows(student)
    for row in data:
        row["input_ids"] %= words
    logits = [model(row["input_ids"][None]).logits for model in (student, teacher) for row in data[:1]]
    torch.testing.assert_close(logits[0][..., :words], logits[1][..., :words])
    for divergence in ("forward_kl", "reverse_kl", "jsd", "mse"):
        losses = {"logits": {"divergence": divergence}}
        trainer = trainer_of(tmp_path, student, teacher, data, losses, processing_class=Vocabulary(words))
        loss = trainer.compute_loss(student.train(), {k: torch.stack([r[k] for r in data]) for k in data[0]})
        assert loss.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("limit", [0.05, 0.0])
def test_projections_and_student_are_clipped_to_one_norm_and_it_is_the_norm_in_the_log(tmp_path, limit):
    teacher, student = tiny_model(layers=4, **NO_DROPOUT), tiny_model(layers=2, hidden=24, seed=1, **NO_DROPOUT)
    data, losses = rows(teacher), {"labels": {}, "hidden": {"layers": "uniform"}}
    whole, _ = step_gradient(tmp_path, student, teacher, data, losses, max_grad_norm=1e6)
    norm = torch.cat([gradient.flatten() for gradient in whole.values()]).norm().item()
    found, log = step_gradient(tmp_path, student, teacher, data, losses, max_grad_norm=limit)
    assert log["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert any(name.startswith("projection") for name in whole) and norm > 0.1
    for name, gradient in whole.items():
        torch.testing.assert_close(found[name], gradient * (limit / norm if limit else 1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_gradients_are_clipped_bit_for_bit_as_the_trainer_clips_them(tmp_path, bound, monkeypatch):
    teacher = tiny_model(seed=1)
    data = rows(teacher)
    found = []
    for whole in (True, False):
        monkeypatch.setattr(DistillationTrainer, "_sees_all_gradients", property(lambda self, whole=whole: whole))
        settings = {"max_grad_norm": bound, "max_steps": 2, "optim": "sgd", "learning_rate": 1.0}
        student = tiny_model(seed=2)
        trainer = trainer_of(tmp_path, student, teacher, data, {"labels": {}, "logits": {}}, **settings)
        trainer.train()
        found.append([parameter.detach().clone() for parameter in student.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
